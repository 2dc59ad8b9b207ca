"""What is known of a reply: its text, tokens and times."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from moiety.client import Chunk
from moiety.core.sampling import FinishReason
from moiety.core.timings import Timings


@dataclass(slots=True)
class Stats:
    """One reply as it grows. The gateway sends the tokens of the prompt and the times at its end only."""

    text: str = ""
    new_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    timings: Timings | None = None
    sent: float = field(default_factory=time.monotonic)
    first_s: float = 0.0  # from `sent` to the first token, as this process saw it
    all_s: float = 0.0  # likewise, to the last one

    def add(self, chunk: Chunk) -> None:
        self.all_s = time.monotonic() - self.sent
        self.first_s = self.first_s or self.all_s
        self.text += chunk.text
        self.new_tokens += len(chunk.token_ids)
        if chunk.finish_reason is not None:
            self.finish_reason, self.timings = chunk.finish_reason, chunk.timings
            self.prompt_tokens, self.cached_tokens = chunk.prompt_tokens, chunk.cached_tokens

    def __str__(self) -> str:
        parts = [f"{self.new_tokens} tokens"]
        if self.prompt_tokens:
            parts.insert(0, f"prompt {self.prompt_tokens} tokens ({self.cached_tokens} cached), reply")
            parts = [" ".join(parts)]
        if self.timings is not None:
            parts.append(f"queued {self.timings.queued_s:.2f} s, prefill {self.timings.prefill_s:.2f} s")
        decode_s = self.timings.decode_s if self.timings is not None else self.all_s - self.first_s
        if self.new_tokens > 1 and decode_s > 0:
            parts.append(f"{(self.new_tokens - 1) / decode_s:.1f} tokens/s")
        parts.append(f"first token after {self.first_s:.2f} s, all after {self.all_s:.2f} s")
        return "; ".join(parts)
