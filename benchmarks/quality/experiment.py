"""One experiment: a method at one learning rate and seed, trained and ready to be scored."""

from __future__ import annotations

import gc
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import ArrowConfig, XLoraConfig, create_arrow_model, get_peft_model
from torch import Tensor, nn

from ..arms import shared_copy
from .batches import Batches, make_batches
from .data import Suite
from .methods import METHODS, Method, Size, method_of, num_trainable
from .scoring import Score, score
from .trainer import Run, Training

State = list[Tensor]  # the trainable parameters


@dataclass(frozen=True)
class Plan:
    """What is alike for all methods: suite, optimizer steps, rows of a batch, size of the mixture, device."""

    suite: str
    steps: int
    rows: int
    size: Size
    device: str


@dataclass
class Trained:
    """A trained model.

    Args:
        states: where there is one model per domain, its trainable parameters by domain.
        mixed: whether it runs under autocast.
    """

    model: nn.Module
    run: Run
    num_parameters: int
    data: Suite
    device: str
    states: dict[str, State] = field(default_factory=dict)
    mixed: bool = True

    def scores(self, split: str) -> dict[str, Score]:
        """By domain."""
        found = {}
        for domain, examples in self.data.items():
            if self.states:
                put_state(self.model, self.states[domain])
            found[domain] = score(self.model, examples[split], self.device, self.mixed)
        return found


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def state_of(model: nn.Module) -> State:
    """A copy of the trainable parameters."""
    return [parameter.detach().clone() for parameter in _trainable(model)]


@torch.no_grad()
def put_state(model: nn.Module, state: State) -> None:
    """Set the trainable parameters."""
    for parameter, value in zip(_trainable(model), state, strict=True):
        parameter.copy_(value)


class Bench:
    """The base model and the data of a suite; trains any method on them.

    Args:
        oracle_rate: learning rate of the experts under X-LoRA and Arrow: the one that the oracle's sweep chose.
    """

    def __init__(self, base: nn.Module, data: Suite, plan: Plan, oracle_rate: float | None = None) -> None:
        base.config.use_cache = False  # X-LoRA insists
        self.base, self.data, self.plan = base.requires_grad_(False), data, plan
        self.oracle_rate = oracle_rate
        self._experts: tuple[tuple[float, int], Trained] | None = None  # of the rate and seed used last

    def train(self, name: str, learning_rate: float, seed: int) -> Trained:
        """Train a method. The model, its batches and what is random in training follow from the seed."""
        gc.collect()
        if self.plan.device == "cuda":
            torch.cuda.empty_cache()
        method = method_of(name)
        if method.kind == "xlora":
            return self._xlora(learning_rate, seed)
        if method.kind == "arrow":
            return self._arrow(seed)
        torch.manual_seed(seed)
        with torch.device(self.plan.device):
            model = method.build(self.base, self.plan.size)
        if method.kind == "frozen":
            return self._trained(model, Run(0.0, 0, captured=False))
        if method.kind == "oracle":
            return self._oracle(model, learning_rate, seed)
        batches = self._batches(list(self.data), self.plan.steps, seed)
        return self._trained(model, self._fit(method, model, batches, learning_rate))

    def _trained(self, model: nn.Module, run: Run, num_parameters: int | None = None) -> Trained:
        count = num_trainable(model) if num_parameters is None else num_parameters
        return Trained(model, run, count, self.data, self.plan.device)

    def _batches(self, domains: Sequence[str], steps: int, seed: int) -> Batches:
        sources = [self.data[domain]["train"] for domain in domains]
        return make_batches(sources, steps, self.plan.rows, seed, self.plan.device)

    def _fit(self, method: Method, model: nn.Module, batches: Batches, learning_rate: float) -> Run:
        groups = method.groups(model) if method.groups else None
        return Training(model, batches, self.plan.device, groups).run(batches, learning_rate)

    def _oracle(self, model: nn.Module, learning_rate: float, seed: int) -> Trained:
        """One model and one graph; each domain starts from the same initial state with its share of the steps."""
        steps = max(1, self.plan.steps // len(self.data))
        training: Training | None = None
        states, runs = {}, []
        for domain in self.data:
            batches = self._batches([domain], steps, seed)
            training = training or Training(model, batches, self.plan.device)
            training.reset()
            runs.append(training.run(batches, learning_rate))
            states[domain] = state_of(model)
        run = Run(sum(r.seconds for r in runs), max(r.peak_bytes for r in runs), runs[0].captured)
        trained = self._trained(model, run, len(states) * num_trainable(model))
        trained.states = states
        return trained

    def experts(self, seed: int) -> Trained:
        """The oracle's models for this seed; those of the seed used last are kept.

        Raises:
            ValueError: the oracle's learning rate is not settled.
        """
        if self.oracle_rate is None:
            raise ValueError("X-LoRA and Arrow stand on the oracle's experts; run the method `oracle` first")
        key = (self.oracle_rate, seed)
        if self._experts is None or self._experts[0] != key:
            self._experts = (key, self.train("oracle", *key))
        return self._experts[1]

    def _saved_experts(self, seed: int, folder: str) -> list[str]:
        experts, paths = self.experts(seed), []
        for number, state in enumerate(experts.states.values()):
            put_state(experts.model, state)
            paths.append(str(Path(folder) / str(number)))
            experts.model.save_pretrained(paths[-1], save_embedding_layers=False)
        return paths

    def _xlora(self, learning_rate: float, seed: int) -> Trained:
        with tempfile.TemporaryDirectory() as folder:
            paths = dict(zip(map(str, range(len(self.data))), self._saved_experts(seed, folder), strict=True))
            torch.manual_seed(seed)
            width = self.base.config.hidden_size
            config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=width, adapters=paths)
            model = get_peft_model(shared_copy(self.base), config)
        tuner = model.base_model
        classifier = tuner.internal_xlora_classifier.float()

        def dummy_scalings(input_ids: Tensor, **_: object) -> Tensor:
            # As PEFT's, but made on the device: a copy from the host cannot be captured.
            shape = (*input_ids.shape, classifier.n_layers, classifier.n_classes)
            return torch.full(shape, float(classifier.override_scaling_pass_value), device=input_ids.device)

        classifier.make_dummy_scalings = dummy_scalings
        batches = self._batches(list(self.data), max(1, self.plan.steps // 4), seed)
        run = self._fit(METHODS["xlora"], model, batches, learning_rate)
        return self._over_experts(model, seed, run)

    def _arrow(self, seed: int) -> Trained:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            paths = self._saved_experts(seed, folder)
            model = create_arrow_model(shared_copy(self.base), paths, ArrowConfig(rng_seed=seed))
        trained = self._over_experts(model, seed, Run(0.0, 0, captured=False))
        trained.mixed = False  # its scatter does not run under autocast
        return trained

    def _over_experts(self, model: nn.Module, seed: int, run: Run) -> Trained:
        """Parameters, time and memory with those of the experts."""
        below = self.experts(seed)
        own = num_trainable(model) if run.seconds else 0
        run = Run(run.seconds + below.run.seconds, max(run.peak_bytes, below.run.peak_bytes), run.captured)
        return self._trained(model, run, below.num_parameters + own)
