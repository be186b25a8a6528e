"""Tokens per target pass of transformers' drafts of another vocabulary, to compare with those of bench_spec.py.

    pip install torch==2.13.0 transformers==5.23.0 accelerate
    python scripts/bench_universal.py -m TARGET.gguf --draft DRAFT.gguf --prompts 10 --lengths 4

Greedily that is universal assisted generation (UAG), which tokenizes the draft's text anew for the target; at a
temperature it is UAG-TLI, whose draft is confined to the tokens that both vocabularies have. Both models are read from
their GGUF files. The prompts are those of bench_spec.py, in the target's chat template; every
round drafts the same number of tokens, however confident the draft is. A target pass is a call of the target, of which
the first reads the prompt and checks a draft, too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from bench_spec import SAMPLED, prompts
from harness import Row, add_model, markdown, table_line
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(path: Path) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32), tokenizer


def main() -> None:
    """Parse the command line, measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--draft", type=Path, metavar="GGUF", required=True)
    parser.add_argument("--prompts", type=int, metavar="N", default=10)
    parser.add_argument("--tokens", type=int, default=48, metavar="N", help="of each answer (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4], metavar="N", help="drafted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    for name, sampling in (("UAG, greedy", {}), ("UAG-TLI, temperature 0.7", {"temperature": SAMPLED["temperature"]})):
        target, tokenizer = load(arguments.model)
        draft, draft_tokenizer = load(arguments.draft)  # anew, as TLI prunes it
        passes = 0

        def count(*_: Any) -> None:
            nonlocal passes
            passes += 1

        target.register_forward_pre_hook(count)
        for n_draft in arguments.lengths:
            config = draft.generation_config
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = n_draft, "constant"
            config.assistant_confidence_threshold = 0.0
            n_tokens = n_passes = 0
            by_prompt = []
            for row in tqdm(prompts(arguments.prompts)):
                torch.manual_seed(SAMPLED["seed"])
                inputs = tokenizer.apply_chat_template(
                    [{"role": "user", "content": row["prompt"]}],
                    add_generation_prompt=True,
                    return_tensors="pt",
                    return_dict=True,
                )
                passes = 0
                output = target.generate(
                    **inputs,
                    max_new_tokens=arguments.tokens,
                    do_sample=bool(sampling),
                    **sampling,
                    assistant_model=draft,
                    tokenizer=tokenizer,
                    assistant_tokenizer=draft_tokenizer,
                )
                n = output.shape[1] - inputs["input_ids"].shape[1]
                by_prompt.append(f"{n / passes:.2f}")
                n_tokens, n_passes = n_tokens + n, n_passes + passes
            rows.append(
                {
                    "Method": name,
                    "Prompts": len(by_prompt),
                    "Draft tokens": n_draft,
                    "Tokens per pass": f"{n_tokens / n_passes:.2f}",
                    "By prompt": ", ".join(by_prompt),
                }
            )
            print(table_line(rows[-1].values()), file=sys.stderr, flush=True)
    print(markdown(rows))


if __name__ == "__main__":
    main()
