"""A policy for tests that asks for every pull that would bring something; it knows no cost, only who caches what."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cluster.routing_policy import CacheAware, RouteRequest, RoutingPolicy
from cluster.view import ClusterView, PagePull, Route


@dataclass(frozen=True)
class PullFromTheBest:
    """Routes as ``inner`` does; whoever prefills pulls from the worker that caches most of the prompt, if not itself.

    ``sources``: workers that may be pulled from; empty: any.
    """

    inner: RoutingPolicy = field(default_factory=CacheAware)
    sources: frozenset[str] = frozenset()
    uses_prefixes: bool = True

    def route(self, request: RouteRequest, view: ClusterView) -> Route:
        route = self.inner.route(request, view)
        here = route.prefill or route.decode
        others = [w for w in view.workers if w is not here and (not self.sources or w.worker_id in self.sources)]
        best = max(others, key=request.cached_tokens, default=here)
        if request.cached_tokens(best) <= request.cached_tokens(here):
            return route
        pull = PagePull(best, request.cached_tokens(best))
        return replace(route, pull=pull, reason=f"{route.reason}; pulls from {best.worker_id}")
