"""``python -m cluster`` is ``prfaas``, for places where the distribution is not installed (a Ray job's folder)."""

from cluster.cli import main

main()
