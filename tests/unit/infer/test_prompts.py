"""How long prompts are padded: long enough, within the model's positions, and to few lengths."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from odelm.errors import InputError
from odelm.infer.prompts import SMALLEST_BUCKET, check_room, padded, read, sizes


@pytest.mark.parametrize("limit", [32, 100, 128, 1024])
def test_sizes_hold_the_prompt_and_the_tokens_and_are_few(limit):
    programs = set()
    for longest in range(1, limit):
        for new_tokens in range(1, limit - longest + 1):
            width, room = sizes(longest, new_tokens, limit)
            assert longest <= width and new_tokens <= room and width + room <= limit + 1
            if longest + new_tokens <= limit + 1 - SMALLEST_BUCKET:  # else the room is filled to the last, as it comes
                programs.add((width, room))
    # Pairs of powers of two, and near the limit a few multiples of the smallest.
    assert len(programs) <= limit.bit_length() ** 2 / 2 + limit / SMALLEST_BUCKET


def test_prompts_of_every_length_before_one_token_share_few_programs():
    """Also those that take more than half of the positions."""
    assert len({sizes(longest, 1, 1024) for longest in range(1, 1024)}) < 10
    assert len({sizes(longest, 100, 1024) for longest in range(1, 925)}) < 10


def test_with_a_window_only_prompts_are_limited(make_config):
    assert sizes(20, 5000, 64, 8) == (32, 8192) and sizes(60, 20, 62, 8) == (62, 32)
    check_room([[1] * 64], 5000, make_config(max_length=64), 8)
    with pytest.raises(InputError, match="prompt 1 has 65 tokens, more than model.max_length 64: shorten it to 64 or"):
        check_room([[1], [1] * 65], 5000, make_config(max_length=64), 8)


def test_prompts_are_padded_at_their_ends():
    rows, lengths = padded([[1, 2, 3], [4]], 16)
    assert rows.shape == (2, 16) and rows.dtype == np.int32
    np.testing.assert_array_equal(rows[:, :4], [[1, 2, 3, 0], [4, 0, 0, 0]])
    assert lengths.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("lengths", "new_tokens", "words"),
    [
        ([60], 8, "the prompt's 60 tokens and 8 new ones are more than model.max_length 64: ask for 4 new tokens"),
        ([3, 60, 5], 8, "prompt 1's 60 tokens and 8 new ones are more than model.max_length 64: ask for 4 new"),
        ([16001], 8, "the prompt's 16001 tokens and 8 new ones are .*: shorten it to 56 tokens or fewer"),
        ([1, 64], 8, "prompt 1's 64 tokens and 8 new ones are .*: shorten it to 56 tokens or fewer"),
        ([99], 64, "the prompt's 99 tokens and 64 new ones are .*: shorten it, and ask for fewer new tokens"),
    ],
)
def test_a_prompt_without_room_is_named_with_what_would_fit(make_config, lengths, new_tokens, words):
    with pytest.raises(InputError, match=words):
        check_room([[1] * length for length in lengths], new_tokens, make_config(max_length=64))
    check_room([[1] * 56], 8, make_config(max_length=64))


def test_numbers_of_numpy_are_numbers():
    assert sizes(np.int64(3), np.int64(20), 64) == sizes(3, 20, 64)


def test_half_of_a_character_is_refused(make_config):
    """What a byte that is not UTF-8 becomes in a command line, and what JSON may hold."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(InputError, match="prompt 1 is not UTF-8: '.udcff' at character 2"):
        read(["a", "a\udcff"], tokenizer, make_config())
