"""Streamers: what they print and yield, for one row and several, and how a stream ends when its producer fails."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from unspool.streaming import AsyncTextIteratorStreamer, BaseStreamer, TextIteratorStreamer, TextStreamer

PAD, EOS = 0, 1


class Bytes:
    """Ids 2 to 257 are bytes; 0 is padding, 1 ends a text."""

    pad_token_id = PAD
    eos_token_id = EOS

    def decode(self, ids: list[int], skip_special_tokens: bool = False, **_: Any) -> str:
        parts = [bytes([token - 2]) if token > EOS else (b"" if skip_special_tokens else b"|") for token in ids]
        return b"".join(parts).decode("utf-8", "replace")


def ids(text: str) -> list[int]:
    return [byte + 2 for byte in text.encode()]


def play(streamer: BaseStreamer, prompt: str, text: str) -> None:
    """Stream one row."""
    streamer.put(torch.tensor([ids(prompt)]))
    for token in ids(text):
        streamer.put(torch.tensor([token]))
    streamer.end()


def play_rows(streamer: TextStreamer, prompts: list[str], texts: list[str]) -> None:
    """Stream several rows as the core does: left-padded prompt with its mask, then tokens with who is live."""
    width = max(map(len, map(ids, prompts)))
    rows = [ids(prompt) for prompt in prompts]
    prompt = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    streamer.put(prompt, mask=mask)
    tokens = [ids(text) for text in texts]
    for step in range(max(map(len, tokens))):
        live = [step < len(row) for row in tokens]
        streamer.put(torch.tensor([row[step] if on else PAD for row, on in zip(tokens, live, strict=True)]), live=live)
    streamer.end()


def joined(pieces: list[list[str]]) -> list[str]:
    return ["".join(row) for row in zip(*pieces, strict=True)]


def test_one_row_is_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    play(TextStreamer(Bytes()), "né ", "à la 😀\nfin")
    assert capsys.readouterr().out == "né à la 😀\nfin\n"


def test_characters_appear_without_waiting_for_the_end_of_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    streamer = TextStreamer(Bytes(), skip_prompt=True)
    streamer.put(torch.tensor([ids("prompt")]))
    streamer.put(torch.tensor(ids("w")))
    assert capsys.readouterr().out == "w"


def test_a_streamer_can_be_used_again(capsys: pytest.CaptureFixture[str]) -> None:
    streamer = TextStreamer(Bytes(), skip_prompt=True)
    play(streamer, "a", "b")
    play(streamer, "c", "d")
    assert capsys.readouterr().out == "b\nd\n"


def test_decode_settings_are_passed_on() -> None:
    streamer = TextIteratorStreamer(Bytes(), skip_special_tokens=True)
    streamer.put(torch.tensor([ids("a") + [EOS] + ids("b")]))
    streamer.end()
    assert "".join(streamer) == "ab"


def test_rows_are_printed_in_order_the_first_open_one_live(capsys: pytest.CaptureFixture[str]) -> None:
    streamer = TextStreamer(Bytes(), skip_prompt=True)
    streamer.put(torch.tensor([ids("x"), ids("y")]))
    streamer.put(torch.tensor([ids("a")[0], ids("c")[0]]), live=[True, True])
    assert capsys.readouterr().out == "[0] a"
    streamer.put(torch.tensor([PAD, ids("d")[0]]), live=[False, True])
    assert capsys.readouterr().out == "\n[1] cd"
    streamer.put(torch.tensor([PAD, ids("e")[0]]), live=[False, True])
    streamer.end()
    assert capsys.readouterr().out == "e\n"


def test_rows_yield_one_piece_each_and_nothing_for_padding_or_finished_rows() -> None:
    streamer = TextIteratorStreamer(Bytes())
    play_rows(streamer, ["long prompt ", "p "], ["ab", "😀 and on"])
    pieces = list(streamer)
    assert all(isinstance(piece, list) and len(piece) == 2 for piece in pieces)
    assert joined(pieces) == ["long prompt ab", "p 😀 and on"]


def test_a_finished_row_gives_its_unfinished_character() -> None:
    streamer = TextIteratorStreamer(Bytes(), skip_prompt=True)
    streamer.put(torch.tensor([[2], [2]]))
    streamer.put(torch.tensor([2 + 0xE4, 2 + 65]), live=[True, True])
    streamer.put(torch.tensor([PAD, 2 + 66]), live=[False, True])
    assert [next(streamer), next(streamer)] == [["", "A"], ["\ufffd", "B"]]


def test_rows_without_word_of_who_is_live_drop_the_filler() -> None:
    streamer = TextIteratorStreamer(Bytes())
    streamer.put(torch.tensor([[PAD, *ids("a")], ids("bb")]))
    for step in ([EOS, ids("c")[0]], [PAD, ids("d")[0]], [EOS, EOS]):
        streamer.put(torch.tensor(step))
    streamer.end()
    assert joined(list(streamer)) == ["a|", "bbcd|"]


def test_several_tokens_a_step() -> None:
    streamer = TextIteratorStreamer(Bytes(), skip_prompt=True)
    streamer.put(torch.tensor([ids("p")]))
    streamer.put(torch.tensor([ids("abc")]))
    streamer.put(torch.tensor(ids("de")))
    streamer.end()
    assert "".join(streamer) == "abcde"


def test_another_number_of_rows_is_refused() -> None:
    streamer = TextIteratorStreamer(Bytes())
    streamer.put(torch.tensor([[2], [3]]))
    with pytest.raises(ValueError, match="3 rows, but this stream began with 2"):
        streamer.put(torch.tensor([2, 3, 4]))


def test_subclass_hooks_get_the_text() -> None:
    class Collect(TextStreamer):
        def __init__(self) -> None:
            super().__init__(Bytes(), skip_prompt=True)
            self.seen: list[tuple[str, bool]] = []

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.seen.append((text, stream_end))

    streamer = Collect()
    play(streamer, "p", "ab")
    assert streamer.seen == [("a", False), ("b", False), ("", True)]
    assert Collect.row_aware


def test_a_put_written_for_transformers_is_not_given_more_arguments() -> None:
    class Plain(TextStreamer):
        def put(self, value: Any) -> None:  # type: ignore[override]
            super().put(value)

    assert not Plain.row_aware
    assert not BaseStreamer.row_aware
    assert TextIteratorStreamer.row_aware
    assert AsyncTextIteratorStreamer.row_aware


def generate(fail_after: int | None = None, text: str = "hello") -> Callable[..., None]:
    """A stand-in for `model.generate`."""

    def run(*, streamer: BaseStreamer, prompt: str = "p ") -> None:
        streamer.put(torch.tensor([ids(prompt)]))
        for step, token in enumerate(ids(text)):
            if step == fail_after:
                raise KeyError("lost")
            streamer.put(torch.tensor([token]))
        streamer.end()

    return run


def test_iterating_over_another_threads_text() -> None:
    streamer = TextIteratorStreamer(Bytes(), skip_prompt=True, timeout=20)
    thread = streamer.start(generate())
    assert "".join(streamer) == "hello"
    thread.join()
    assert next(streamer, None) is None
    thread = threading.Thread(target=generate(text="again"), kwargs={"streamer": streamer})
    thread.start()
    assert "".join(streamer) == "again"
    thread.join()


def test_the_readers_loop_raises_the_producers_exception() -> None:
    streamer = TextIteratorStreamer(Bytes(), skip_prompt=True, timeout=20)
    streamer.start(generate(fail_after=2)).join()
    text = ""
    with pytest.raises(KeyError, match="lost"):  # noqa: PT012 - the loop is what is tested
        for piece in streamer:
            text += piece
    assert text == "he"
    with pytest.raises(KeyError, match="lost"):
        next(streamer)
    streamer.start(generate())
    assert "".join(streamer) == "hello"


def test_a_failure_told_twice_is_raised_once() -> None:
    streamer = TextIteratorStreamer(Bytes(), timeout=20)
    error = KeyError("lost")
    streamer.fail(error)
    streamer.fail(error)
    with pytest.raises(KeyError):
        next(streamer)
    assert streamer.text_queue.empty()


def test_a_dead_producer_is_an_error_and_not_a_wait() -> None:
    streamer = TextIteratorStreamer(Bytes(), skip_prompt=True)

    def die() -> None:
        streamer.put(torch.tensor([ids("p")]))
        streamer.put(torch.tensor([ids("a")[0]]))

    thread = threading.Thread(target=die, name="worker")
    thread.start()
    thread.join()
    assert next(streamer) == "a"
    with pytest.raises(RuntimeError, match="'worker' ended without"):
        next(streamer)


def test_a_timeout_is_that_of_queue() -> None:
    with pytest.raises(queue.Empty):
        next(TextIteratorStreamer(Bytes(), timeout=0.01))


def test_failure_ends_the_printed_line(capsys: pytest.CaptureFixture[str]) -> None:
    streamer = TextStreamer(Bytes())
    streamer.put(torch.tensor([ids("abc")]))
    streamer.fail(KeyError("lost"))
    assert capsys.readouterr().out == "abc\n"


async def collect(streamer: AsyncTextIteratorStreamer) -> list[Any]:
    return [piece async for piece in streamer]


def test_async_iteration_of_a_streamer_made_in_the_loop() -> None:
    async def main() -> list[Any]:
        streamer = AsyncTextIteratorStreamer(Bytes(), skip_prompt=True, timeout=20)
        streamer.start(generate(text="né😀"))
        return await collect(streamer)

    assert "".join(asyncio.run(main())) == "né😀"


def test_async_iteration_of_a_streamer_made_and_fed_before_the_loop() -> None:
    streamer = AsyncTextIteratorStreamer(Bytes(), skip_prompt=True, timeout=20)
    play_rows(streamer, ["a", "bb"], ["x", "yz"])
    assert joined(asyncio.run(collect(streamer))) == ["x", "yz"]

    async def elsewhere() -> None:
        await anext(streamer)

    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(elsewhere())


def test_async_reader_gets_the_producers_exception() -> None:
    async def main() -> str:
        streamer = AsyncTextIteratorStreamer(Bytes(), skip_prompt=True, timeout=20)
        streamer.start(generate(fail_after=3))
        text = ""
        with pytest.raises(KeyError, match="lost"):  # noqa: PT012 - the loop is what is tested
            async for piece in streamer:
                assert isinstance(piece, str)
                text += piece
        with pytest.raises(KeyError, match="lost"):
            await anext(streamer)
        return text

    assert asyncio.run(main()) == "hel"


def test_async_timeout_and_dead_producer() -> None:
    async def silent() -> None:
        await anext(AsyncTextIteratorStreamer(Bytes(), timeout=0.01))

    with pytest.raises(TimeoutError):
        asyncio.run(silent())

    async def dead() -> None:
        streamer = AsyncTextIteratorStreamer(Bytes(), skip_prompt=True)
        thread = threading.Thread(target=streamer.put, args=(torch.tensor([[2]]),), name="worker")
        thread.start()
        thread.join()
        await anext(streamer)

    with pytest.raises(RuntimeError, match="'worker' ended without"):
        asyncio.run(dead())
