"""vLLM in benchmarks/engine_cpu.py: its offline ``LLM``, run by the Python of its own virtual environment.

    VENV/bin/python benchmarks/vllm_offline_arm.py MODEL_FOLDER DTYPE THREADS

Imports nothing of ours. The lines on stdin and stdout are those of benchmarks/engine_cpu_arm.py; what vLLM prints goes
to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main(model_folder: str, dtype: str, threads: str) -> None:
    """Answer every wave on stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: its time is this one's
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{int(threads) - 1}"
    began_at = time.perf_counter()
    from vllm import LLM, SamplingParams, __version__

    llm = LLM(model_folder, dtype=dtype, max_model_len=4096, max_num_seqs=64, enable_prefix_caching=False)
    ready = {"start_s": time.perf_counter() - began_at, "mode": f"vLLM {__version__}"}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        wave = json.loads(line)
        sampling = SamplingParams(max_tokens=wave["num_new_tokens"], temperature=0.0, ignore_eos=True)
        prompts = [{"prompt_token_ids": prompt} for prompt in wave["prompts"]]
        wall_began_at, cpu_began_at = time.perf_counter(), time.process_time()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        answer = {
            "seconds": time.perf_counter() - wall_began_at,
            "cpu_s": time.process_time() - cpu_began_at,
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
