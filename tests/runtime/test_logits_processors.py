"""Users' logits processors inside the real step, against NumPy and against an engine without."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine import (
    LogitsContext,
    Parameter,
    RepetitionDetectionParams,
    SamplingParams,
    logits_processor,
)
from jengine.config import EngineConfig
from jengine.core_client import ProcessCoreClient
from jengine.errors import InvalidRequestError, UnsupportedError
from jengine.logits_processors import encode_arguments, load_processors
from jengine.runtime.logits_processing import check_processors
from tests.oracles.core_pump import CorePump
from tests.oracles.dummy_model import VOCAB_SIZE, write_dummy_model
from tests.oracles.numpy_sampler import adjusted_logits

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPT = [5, 9, 60]


@logits_processor(strength=Parameter(), ids=Parameter("int32", (3,), default=-1))
def favour(logits: jax.Array, context: LogitsContext) -> jax.Array:
    named = jax.nn.one_hot(context.params["ids"], logits.shape[1]).max(axis=1)
    return logits + context.params["strength"][:, None] * named


@logits_processor(no_repeat=Parameter("bool"))
def forbid_repeats(logits: jax.Array, context: LogitsContext) -> jax.Array:
    is_seen = (context.output_counts > 0) | context.prompt_mask
    return jnp.where(is_seen & context.params["no_repeat"][:, None], -jnp.inf, logits)


def only_even_positions_even(logits: jax.Array, context: LogitsContext) -> jax.Array:
    """Without parameters: acts on every request."""
    tokens = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
    return jnp.where(tokens % 2 == context.positions[:, None] % 2, logits, -jnp.inf)


@logits_processor(broken=Parameter("bool"))
def break_it(logits: jax.Array, context: LogitsContext) -> jax.Array:
    return jnp.full_like(logits, jnp.nan)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dummy_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model: Path) -> CorePump:
    """Greedy requests without arguments see raw logits in this mode."""
    return pump(
        model,
        logits_processors=[favour, forbid_repeats, break_it],
        logprobs_mode="processed_logits",
        max_logprobs=-1,
    )


def pump(model: Path, **kwargs) -> CorePump:
    return CorePump(model, prefill_buckets=(32,), decode_buckets=(4,), max_decode_steps=4, **kwargs)


def test_processors_act_on_those_who_name_them(engine: CorePump) -> None:
    sampled = GREEDY.clone(temperature=1.0, top_k=20)
    alone = engine.alone(PROMPT, GREEDY), engine.alone(PROMPT, sampled, seed=3)
    runner, text = engine.core.runner, list(PROMPT)
    for token in alone[0]:
        logits = runner.model.logits(runner.hidden_states(text), jnp.int32(len(text)))
        assert token == int(logits[-1].argmax())
        text.append(token)

    strong = {"strength": 1e4, "ids": [7, 8, 9]}
    engine.submit("plain", PROMPT, GREEDY)
    engine.submit("sampled", PROMPT, sampled, seed=3)
    engine.submit("favoured", PROMPT, GREEDY.clone(extra_args=strong), is_streamed=False)
    engine.submit("broken", PROMPT, GREEDY.clone(extra_args={"broken": True}))
    engine.drain()
    tokens = engine.tokens()
    assert (tokens["plain"], tokens["sampled"]) == alone
    assert set(tokens["favoured"]) <= {7, 8, 9}
    assert engine.finish_reasons()["broken"] == "error", "NaN fails its own request"
    assert engine.finish_reasons()["plain"] == "length"

    assert engine.core.stats().num_corrupted == 1
    circle = GREEDY.clone(
        extra_args={"strength": 1e4, "ids": [7, 7, 7]},
        repetition_detection=RepetitionDetectionParams(max_pattern_size=2, min_count=3),
    )
    engine.messages.clear()
    engine.submit("circle", PROMPT, circle)
    engine.drain()
    assert engine.tokens()["circle"] == [7, 7, 7]
    assert engine.finish_reasons()["circle"] == "repetition"

    off = GREEDY.clone(extra_args={"no_repeat": False})
    assert engine.alone(PROMPT, off) == alone[0]
    on = GREEDY.clone(max_tokens=40, extra_args={"no_repeat": True})
    assert len({*engine.alone(PROMPT, on), *PROMPT}) == 40 + len(PROMPT)


def test_the_order_is_that_of_the_oracle(engine: CorePump) -> None:
    """Masks, bias, processors, penalties."""
    params = GREEDY.clone(
        max_tokens=1,
        logprobs=-1,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        logit_bias={9: -1.0},
        allowed_token_ids=[5, 9, 11, 60, 100],
    )

    def all_logits(params: SamplingParams) -> np.ndarray:
        engine.messages.clear()
        engine.submit("r", PROMPT, params)
        engine.drain()
        (output,) = (o for o in engine.outputs()["r"] if o.logprobs)
        assert output.logprobs is not None
        values = np.zeros(VOCAB_SIZE)
        values[output.logprobs[0].token_ids[1:]] = output.logprobs[0].logprobs[1:]
        return values

    logits = all_logits(GREEDY.clone(max_tokens=1, logprobs=-1))
    favoured = logits.copy()
    favoured[[9, 11]] += 20.0
    expected = adjusted_logits(favoured, params, PROMPT, [], [])
    got = all_logits(params.clone(extra_args={"strength": 20.0, "ids": [9, 11, 12]}))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    # The comparison fails where the order is another.
    last = adjusted_logits(logits, params, PROMPT, [], [])
    last[[9, 11]] += 20.0
    assert abs(got[9] - last[9]) > 1.0


@pytest.mark.slow
def test_one_without_parameters_acts_on_all(model: Path) -> None:
    engine = pump(model, logits_processors=[only_even_positions_even])
    for i in range(3):
        engine.submit(f"r{i}", [5] * (2 + i), GREEDY.clone(temperature=float(i)))
    engine.drain()
    for i, tokens in enumerate(engine.tokens().values()):
        assert [(t - p) % 2 for p, t in enumerate(tokens, start=2 + i)] == [0] * 6


def narrow(logits: jax.Array, context: LogitsContext) -> jax.Array:
    return logits.astype(jnp.bfloat16)


def cut(logits: jax.Array, context: LogitsContext) -> jax.Array:
    return logits[:, :-1]


def branches(logits: jax.Array, context: LogitsContext) -> jax.Array:
    return logits if logits.sum() > 0 else -logits


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (narrow, r"narrow returns bfloat16\[4, 128\] instead of float32\[4, 128\]"),
        (cut, r"cut returns float32\[4, 127\]"),
        (branches, "branches fails: TracerBoolConversionError"),
        ("tests.runtime.nowhere:f", "No module named"),
        ("unknown", "neither 'module:function' nor the name of an entry point"),
        (dict, "dict is not a function"),
    ],
)
def test_what_cannot_be_compiled_fails_at_start(model: Path, function, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pump(model, logits_processors=[function])


def test_a_process_is_told_names_only() -> None:
    config = EngineConfig.from_kwargs("m", logits_processors=[favour])
    with pytest.raises(UnsupportedError, match="name it as 'module:function'"):
        ProcessCoreClient(config, "tests.nowhere:Core")


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"ids": [1, 2, 3]}, "strength: must be given"),
        ({"strength": [1.0]}, r"strength: must be float32\[\], got float64\[1\]"),
        ({"strength": 1, "ids": [1, 2]}, r"ids: must be int32\[3\], got int64\[2\]"),
        ({"strength": 1, "ids": [1, 2, 2**31]}, "32 bits"),
        ({"strength": "x"}, "strength"),
        ({"no_repeat": 1}, r"must be bool\[\]"),
        ({"strenght": 1.0}, r"takes 'strenght' \(known: ids, no_repeat, strength\)"),
    ],
)
def test_arguments_are_checked(extra_args: dict, message: str) -> None:
    infos = [processor.info for processor in load_processors([favour, forbid_repeats])]
    with pytest.raises(InvalidRequestError, match=message):
        encode_arguments(infos, extra_args)


DIGEST = """
from jengine.logits_processors import load_processors
from jengine.runtime.logits_processing import check_processors
names = ["tests.runtime.test_logits_processors:favour"]
print(check_processors(load_processors(names), 128)[0])
"""


def test_digests_see_what_is_compiled_and_nothing_else() -> None:
    def shifted(by: float):
        table = np.full(128, by, np.float32)
        return lambda logits, context: jax.nn.relu(logits) + table[None]

    one, same, other = check_processors(
        load_processors([shifted(1.0), shifted(1.0), shifted(2.0)]), 128
    )
    assert one == same != other
    here = check_processors(load_processors([favour]), 128)[0]
    elsewhere = subprocess.run(
        [sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True
    )
    assert elsewhere.stdout.strip() == here
