"""Threads that run one model at once: each gets what it would have got alone, and leaves nothing to the others."""

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import ARCHITECTURES, SCOPES, RandomRouter, assert_same_grads, mixture_of, routers_of
from tiny import tiny_tokenizer
from transformers import TextIteratorStreamer

E = 4
NUM_THREADS = 3
LLAMA = ARCHITECTURES["llama"]
TEXT = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(autouse=True)
def _many_switches():
    """Python lets another thread on every 5 ms by default, in which a tiny forward is nearly over."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*jobs, rounds=25):
    """Every job's results, its rounds of calls made beside those of all others."""
    start = threading.Barrier(len(jobs))

    def run(job):
        start.wait(timeout=30)
        return [job() for _ in range(rounds)]

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(run, job) for job in jobs]]


def one_hot(index):
    return torch.eye(E)[index % E].expand(2, E) * (index + 1)


def request(index):
    """Inputs and weights that only this thread has; every second lets the routers decide."""
    weights = {"routing_weights": one_hot(index)} if index % 2 == 0 else {}
    return LLAMA.batch(2, 5, labels=False, seed=index) | weights


def assert_nothing_in_force(model):
    """In this thread, nor where a fresh one would look."""
    with ThreadPoolExecutor(1) as pool:
        in_force = model.base_model.routing.in_force
        for seen in (vars(in_force), pool.submit(lambda: dict(vars(in_force))).result()):
            assert seen["context"] is None and seen["entry"] is None and seen["copies"] is None
            assert seen["call"].routing_weights is None


def assert_as_alone(model, call, rounds):
    """call(index) is one thread's request: beside others, it answers what it answers alone, to the bit."""
    alone = [call(index) for index in range(NUM_THREADS)]
    assert not torch.equal(alone[0], alone[1])
    answers = together(*(lambda index=index: call(index) for index in range(NUM_THREADS)), rounds=rounds)
    for index, (mine, expected) in enumerate(zip(answers, alone, strict=True)):
        wrong = sum(not torch.equal(answer, expected) for answer in mine)
        assert not wrong, f"thread {index}: {wrong} of {len(mine)} answers"
    assert_nothing_in_force(model)


@pytest.mark.parametrize("router", ["block", "model", "module", "attached"])
def test_every_forward_is_its_own(router):
    model = mixture_of("llama", router_scope="block" if router == "attached" else router)
    if router == "attached":
        model.attach_router(RandomRouter())

    def forward(index):
        with torch.no_grad():
            return model(**request(index)).logits

    assert_as_alone(model, forward, rounds=40)


def test_forwards_of_encoder_and_decoder():
    model = mixture_of("t5")

    def forward(index):
        weights = {"routing_weights": one_hot(index)} if index % 2 == 0 else {}
        with torch.no_grad():
            return model(**ARCHITECTURES["t5"].batch(2, 5, labels=False, seed=index), **weights).logits

    assert_as_alone(model, forward, rounds=15)


@pytest.mark.parametrize(("scope", "num_beams"), [("block", 1), ("block", 2), ("model", 1), ("module", 2)])
def test_generate_with_weights_and_without(scope, num_beams):
    model = mixture_of("llama", router_scope=scope)
    options = TEXT | {"output_logits": True, "return_dict_in_generate": True, "num_beams": num_beams}
    assert_as_alone(model, lambda index: torch.stack(model.generate(**request(index), **options).logits), rounds=3)


def test_a_stream_beside_forwards():
    model, tokenizer = mixture_of("llama"), tiny_tokenizer()
    inputs = LLAMA.batch(1, 5, labels=False)
    weights = one_hot(2)[:1]

    def stream():
        streamer = TextIteratorStreamer(tokenizer, timeout=30)
        options = {**inputs, **TEXT, "max_new_tokens": 12, "routing_weights": weights, "streamer": streamer}
        writer = threading.Thread(target=model.generate, kwargs=options)
        writer.start()
        text = "".join(streamer)
        writer.join()
        return text

    def forward():
        with torch.no_grad():
            return model(**request(1)).logits

    expected_text, expected_logits = stream(), forward()
    texts, logits = together(stream, forward, rounds=4)
    assert texts == [expected_text] * len(texts)
    assert all(torch.equal(each, expected_logits) for each in logits)
    assert_nothing_in_force(model)


# ---- training ----


def counters(model):
    """What training has counted, exactly; and what every forward has."""
    per_router = {}
    for name, router in routers_of(model).items():
        adapter = router.lora_router["default"]
        per_router[name] = adapter.maturity.tolist(), adapter.tokens_per_expert.tolist()
    return per_router, {name: (s.num_tokens, s.expert_load) for name, s in model.routing_stats().items()}


def steps(model, record):
    """One training step a call, on a batch of its own; record gets its loss and gradients."""
    seeds = iter(range(1000))

    def step():
        model.zero_grad()
        loss = model(**LLAMA.batch(2, 5, seed=next(seeds))).loss
        loss.backward()
        record.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))

    return step


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_training_beside_evaluation(checkpointing):
    """The mode is the model's, so evaluation is a forward without gradients in training mode here."""
    options = {"maturity_tokens": 300, "router_type": "learned_with_maturity"}
    model, reference = (mixture_of("llama", **options) for _ in range(2))
    for each in (model, reference):
        each.train()
        if checkpointing is not None:
            each.enable_input_require_grads()
            each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})

    def evaluate(each):
        def call():
            with torch.no_grad():
                # Dense weights by hand: what maturity is meanwhile makes no difference to them.
                return each(**LLAMA.batch(2, 5, labels=False, seed=9), routing_weights=one_hot(3)).logits

        return call

    def look(each):
        def call():
            with torch.no_grad():
                each(**LLAMA.batch(2, 5, labels=False, seed=8))

        return call

    rounds = 12
    expected, seen = [], []
    alone = evaluate(reference)()
    step, peek = steps(reference, expected), look(reference)
    for _ in range(rounds):
        step()
        peek()
        evaluate(reference)()
    _, _, answers = together(steps(model, seen), look(model), evaluate(model), rounds=rounds)
    for (loss, grads), (expected_loss, expected_grads) in zip(seen, expected, strict=True):
        assert torch.equal(loss, expected_loss)
        assert_same_grads(grads, expected_grads, rtol=0, atol=0)
    assert all(torch.equal(answer, alone) for answer in answers)
    (grown, total), (expected_grown, expected_total) = counters(model), counters(reference)
    assert grown == expected_grown
    for name, (num_tokens, _) in expected_total.items():
        assert total[name][0] == num_tokens == rounds * 20
    assert_nothing_in_force(model)


def test_counts_of_evaluation_are_exact():
    model = mixture_of("llama")

    def forward(index):
        with torch.no_grad():
            model(**LLAMA.batch(2, 5, labels=False, seed=index))

    together(*(lambda index=index: forward(index) for index in range(NUM_THREADS)), rounds=40)
    seen = counters(model)[1]
    model.routing_stats(reset=True)
    for index in range(NUM_THREADS):
        for _ in range(40):
            forward(index)
    assert seen == counters(model)[1]


@pytest.mark.parametrize(
    ("scope", "use_reentrant"),
    [("block", None), ("block", False), ("block", True), ("model", False), ("module", None), ("module", False)],
)
def test_backward_passes_cross(scope, use_reentrant):
    """Forward A, forward B, backward A, backward B and the other way round, each backward in another's thread."""
    model = mixture_of("llama", router_scope=scope, router_aux_loss_coef=0.0 if scope == "module" else 0.1)
    if use_reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.train()
    batches = [
        LLAMA.batch(2, 5, seed=seed) | weights for seed, weights in enumerate([{}, {"routing_weights": one_hot(1)}])
    ]
    model.zero_grad()
    for inputs in batches:
        model(**inputs).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for order in ((0, 1), (1, 0)):
        model.zero_grad()
        with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
            losses = [
                pool.submit(lambda i=i: model(**batches[i]).loss).result() for i, pool in enumerate((first, second))
            ]
            for index, pool in zip(order, (first, second), strict=True):
                pool.submit(losses[index].backward).result()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert_same_grads(grads, expected, rtol=1e-5, atol=1e-6)  # of two summands the order may differ
    assert_nothing_in_force(model)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "non-reentrant"])
def test_gradients_of_forwards_at_once(checkpointing):
    """What a blocks' second run finds in force is its own forward, whatever else runs meanwhile."""
    model = mixture_of("llama", router_type="learned").train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(index):
        inputs = request(index)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat([grad.flatten() for grad in grads if grad is not None])

    assert_as_alone(model, gradients, rounds=8)


# ---- what goes wrong, and what is nested ----


def test_an_exception_in_one_thread_is_its_own():
    model = mixture_of("llama")
    failing = threading.local()

    def fail(*_):
        if getattr(failing, "now", False):
            raise KeyError("on purpose")

    model.get_base_model().model.layers[1].mlp.register_forward_hook(fail)

    def broken():
        failing.now = True
        with torch.no_grad(), pytest.raises(KeyError, match="on purpose"):
            model(**request(0))
        failing.now = False

    def forward(index):
        with torch.no_grad():
            return model(**request(index)).logits

    expected = [forward(1), forward(2)]
    _, *answers = together(broken, lambda: forward(1), lambda: forward(2), rounds=30)
    for mine, right in zip(answers, expected, strict=True):
        assert all(torch.equal(answer, right) for answer in mine)
    assert_nothing_in_force(model)


class Asking(RandomRouter):
    """A router that asks the model itself, once, before it decides."""

    def __init__(self, model):
        super().__init__()
        self.ask = lambda: model(**LLAMA.batch(2, 5, labels=False, seed=7), routing_weights=one_hot(3)).logits
        self.asking = threading.local()

    def forward(self, hidden_states):
        if not getattr(self.asking, "now", False):
            self.asking.now = True
            self.answer = self.ask()
            self.asking.now = False
        return super().forward(hidden_states)


def test_a_router_that_calls_the_model():
    """The forward within has weights of its own, and the one around it goes on as if there had been none."""
    model = mixture_of("llama")
    model.attach_router(RandomRouter())
    inputs = LLAMA.batch(2, 5, labels=False)
    with torch.no_grad():
        expected = model(**inputs).logits
        within = model(**LLAMA.batch(2, 5, labels=False, seed=7), routing_weights=one_hot(3)).logits
        router = Asking(model)
        router.load_state_dict(model.detach_router().state_dict())
        model.attach_router(router)

    def forward():
        with torch.no_grad():
            return model(**inputs).logits

    for mine in together(forward, forward, rounds=15):
        assert all(torch.equal(answer, expected) for answer in mine)
    assert torch.equal(router.answer, within)
    assert_nothing_in_force(model)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_forward_in_the_middle_of_a_block(scope):
    model = mixture_of("llama", router_scope=scope)
    inputs, inner = LLAMA.batch(2, 5), LLAMA.batch(3, 4, labels=False, seed=2)
    with torch.no_grad():
        expected_inner = model(**inner).logits
    expected = model.train()(**inputs)
    expected.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    answers = []

    def look(*_):
        if not answers:
            answers.append(None)
            with torch.no_grad():
                answers[0] = model.eval()(**inner).logits
            model.train()

    handle = model.get_base_model().model.layers[0].input_layernorm.register_forward_hook(look)
    output = model(**inputs)
    handle.remove()
    output.loss.backward()
    assert torch.equal(answers[0], expected_inner) and torch.equal(output.loss, expected.loss)
    assert_same_grads({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, grads, rtol=0, atol=0)
    assert_nothing_in_force(model)


def test_copies_made_in_a_forward_hold_none():
    model = mixture_of("llama")
    inputs = request(0)
    copies = []
    handle = model.get_base_model().model.norm.register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
    with torch.no_grad():
        expected = model(**inputs).logits
    handle.remove()
    again = pickle.loads(pickle.dumps(model))
    for twin in (copies[0], again):
        assert_nothing_in_force(twin)
        twin.get_base_model().model.norm._forward_hooks.clear()
        with torch.no_grad():
            assert torch.equal(twin(**inputs).logits, expected)
