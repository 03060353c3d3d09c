"""The release's names: a round trip changes nothing, and nothing is dropped silently."""

import numpy as np
import pytest
from parity_cases import Case

from dar_jax.errors import InputError
from dar_jax.release.names import tokenizer_entries
from dar_jax.weights.table import from_release, to_release


@pytest.fixture(params=["tokenizer_repa", "tokenizer_full_rank_query_shared_time", "ar_grouped_query"])
def converted(request):
    case = Case.load(request.config.rootpath / "tests" / "golden", request.param)
    model, params, entries = case.llama() if request.param.startswith("ar") else case.tokenizer()
    tensors = {name: case.rules.fill(case.seed, name, tuple(shape)) for name, shape in case.info["parameters"].items()}
    return params, entries, tensors


def test_round_trip_is_exact(converted):
    params, entries, tensors = converted
    back = to_release(entries, params)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_what_does_not_fit_is_named(converted):
    params, entries, tensors = converted
    first, *others = tensors
    with pytest.raises(InputError, match=f"1 missing .{first}"):
        from_release(entries, {name: tensors[name] for name in others}, params)
    with pytest.raises(InputError, match="1 left over .spare"):
        from_release(entries, tensors | {"spare": tensors[first]}, params)
    with pytest.raises(InputError, match=f"{first} has the shape"):
        from_release(entries, tensors | {first: np.zeros((3, 3), np.float32)}, params)
    with pytest.raises(InputError, match="the parameters do not fit the model: 1 left over .extra"):
        from_release(entries, tensors, params | {"extra": np.zeros(3)})


def test_every_parameter_stands_once_in_the_table():
    from dar_jax.config import TokenizerConfig, VelocityConfig

    for share, head in ((False, False), (True, True)):
        config = TokenizerConfig(velocity=VelocityConfig(share_time_encoding=share, mlp_head=head))
        paths = [entry.ours for entry in tokenizer_entries(config)]
        assert len(paths) == len(set(paths))
