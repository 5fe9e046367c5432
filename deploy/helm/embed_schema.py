"""How does the chart's values.schema.json know every key of ``config``? This puts the service's own schema there.

    python deploy/helm/embed_schema.py           write it into deploy/helm/prfaas/values.schema.json
    python deploy/helm/embed_schema.py --check   exit code 1 if that would change the file

All else in that file is written by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cluster.config import service_schema

SCHEMA_FILE = Path(__file__).parent / "prfaas" / "values.schema.json"


def with_service_schema(text: str) -> str:
    """The text of a values.schema.json with the section ``config`` as the code has it now."""
    schema = json.loads(text)
    service = service_schema()
    del service["$schema"]  # a dialect is named once, at the root
    schema["properties"]["config"] = service
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    """Write the file, or check it."""
    before = SCHEMA_FILE.read_text(encoding="utf-8")
    after = with_service_schema(before)
    if arguments == ["--check"]:
        if before != after:
            print(f"{SCHEMA_FILE} is not what the code says: python deploy/helm/embed_schema.py", file=sys.stderr)
        return int(before != after)
    SCHEMA_FILE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
