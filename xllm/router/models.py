"""The models that a router serves, by name, each with its intake and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from xllm.config.router import RouterSettings
from xllm.errors import ModelNotFoundError, UnavailableError
from xllm.protocol.records import InstanceRecord
from xllm.router.intake import Intake
from xllm.router.text.model import TextModel
from xllm.router.view import ClusterView


class ServedModels:
    """At least one model; the first is that of requests which name none, if there is no other."""

    def __init__(
        self, texts: Mapping[str, TextModel], limits: RouterSettings, view: ClusterView
    ) -> None:
        self._intakes = {name: Intake(name, text, limits) for name, text in texts.items()}
        self._view = view
        self.first = next(iter(self._intakes.values()))

    def __iter__(self) -> Iterator[Intake]:
        return iter(self._intakes.values())

    def find(self, name: str) -> Intake:
        """The model that a request names. ModelNotFoundError where it is not served here, or where
        there are several and none is named."""
        if not name and len(self._intakes) == 1:
            return self.first
        intake = self._intakes.get(name)
        if intake is None:
            names = ", ".join(map(repr, self._intakes))
            what = f"no model {name[:100]!r} is served here, but" if name else "name a model:"
            raise ModelNotFoundError(f"{what} {names}", param="model")
        return intake

    def learn(self, record: InstanceRecord) -> None:
        """An instance registered: its facts bound requests to its model, if it is served here."""
        intake = self._intakes.get(record.model)
        if intake is not None:
            intake.learn(record)

    def is_asleep(self, name: str) -> bool:
        """Whether all instances of a model sleep (there is one, then)."""
        states = [one.state for one in self._view if one.record.model == name]
        return bool(states) and all(state == "asleep" for state in states)

    def check_awake(self, name: str) -> None:
        """UnavailableError for a model that is asleep: a request does not wake it."""
        if not self._view.usable(name) and self.is_asleep(name):
            text = f"the model {name!r} is asleep (xllm wake {name})"
            raise UnavailableError(text, everywhere=True)

    def are_ready(self) -> bool:
        """Whether every model that is not asleep can take requests, and one at least is awake."""
        awake = any(not self.is_asleep(name) for name in self._intakes)
        return awake and not self.without_instance()

    def without_instance(self) -> list[str]:
        """Names of models that nobody put to sleep, and that no instance can be asked for."""
        names = self._intakes
        return [one for one in names if not self._view.usable(one) and not self.is_asleep(one)]

    def usable_instances(self) -> list[str]:
        """Names of all instances that can take requests."""
        return [one.name for name in self._intakes for one in self._view.usable(name)]
