"""Several requests in one body, under the limits of their tenant: what can never be let in is said
so, where 429 would promise that it can come back.
"""

from __future__ import annotations

from xllm.errors import InvalidRequestError
from xllm.router.front import Tenant
from xllm.router.http.problem import field_named
from xllm.router.service import RouterService


def window_of(service: RouterService, tenant: Tenant, num_inputs: int, most: int) -> int:
    """How many inputs may be open at a time, `most` at most. InvalidRequestError where there are
    more than may be asked in a minute."""
    with field_named(None, "input"):
        return service.admission.window(tenant.account or tenant.name, num_inputs, most)


def check_together(service: RouterService, tenant: Tenant, num_prompts: int) -> None:
    """InvalidRequestError for prompts that are open together, where the tenant may never have or
    ask so many."""
    with field_named(None, "prompt"):
        account = tenant.account or tenant.name
        most = service.admission.window(account, num_prompts, num_prompts)
    if most < num_prompts:
        raise InvalidRequestError(
            f"prompt: these are {num_prompts} requests, but this tenant may have {most} open",
            param="prompt",
        )
