"""Converts a checkpoint for llama.cpp, by the converter of its own source.

    python -m tests.benchmarks.peers.convert_to_gguf SOURCE CHECKPOINT OUTFILE

A process of its own: the converter reads its command line and changes the module path. It refuses tokenizers whose
pre-tokenizer it has not seen; the benchmark's prompts are token ids, so any will do.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def main(arguments: list[str]) -> None:
    """`arguments`: the folder of llama.cpp's source, the checkpoint's, and the file to write (bf16)."""
    source, checkpoint, outfile = arguments
    sys.path[:0] = [source, str(Path(source) / "gguf-py")]
    base: Any = importlib.import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    converter: Any = importlib.import_module("convert_hf_to_gguf")
    sys.argv = ["convert_hf_to_gguf", checkpoint, "--outtype", "bf16", "--outfile", outfile]
    converter.main()


if __name__ == "__main__":
    main(sys.argv[1:])
