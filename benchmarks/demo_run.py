"""One model answers one prompt in this process: the demo's measurement, as a line of JSON.

python -m benchmarks.demo_run FOLDER PROMPT_IDS.json MAX_NEW_TOKENS
"""

from __future__ import annotations

import json
import sys
from itertools import takewhile
from pathlib import Path

from trianglemix.custom_ops.errors import TriangleMixError
from trianglemix.runtime.session import TriangleSession


def measure(folder: Path, ids: list[int], max_new_tokens: int) -> dict[str, object]:
    """Generates exactly `max_new_tokens` tokens; the answer is what precedes a stop token."""
    session = TriangleSession.from_folder(folder, provider="cpu")
    stop_ids, session.stop_ids = session.stop_ids, frozenset()
    result = session.generate(ids, max_new_tokens)
    assert session.tokenizer is not None, "the demo's prompt was made with the folder's tokenizer"
    answer = session.tokenizer.decode(list(takewhile(lambda i: i not in stop_ids, result.ids)))
    return {
        "answer": answer.strip(),
        "ttft_s": result.ttft_s,
        "tokens_per_s": result.tokens_per_s,
        "peak_rss_mb": result.peak_rss_mb,
        "prompt_tokens": result.prompt_tokens,
        "kernel": result.kernel,
        "triangle_layers": list(session.manifest.triangle_layers),
        "block_sparse_layers": list(session.manifest.block_sparse_layers),
    }


if __name__ == "__main__":
    try:
        prompt = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
        print(json.dumps(measure(Path(sys.argv[1]), prompt, int(sys.argv[3]))))
    except TriangleMixError as error:
        sys.exit(str(error))
