"""Compile beam search's Triton kernels as OPT-2.7B launches them, without a GPU.

    python tests/triton_compile_beams.py 90     # compute capability 9.0

Prints a line a kernel: its name and the bytes of shared memory that it needs.
"""

from __future__ import annotations

import sys

import torch
from triton_compile import prepare

from blip2.gpu import kernel_launch
from blip2.language.native import beam_kernels, cuda_cache, cuda_decoding
from blip2.language.session import GenerationOptions
from blip2.language.trtllm_format import OPTCheckpointConfig


def main(capability: int) -> None:
    launch_options = prepare(capability, beam_kernels)
    kernel_launch._dependent_options = lambda _device: launch_options
    config = OPTCheckpointConfig(
        dtype="float16",
        num_hidden_layers=1,
        num_attention_heads=1,
        hidden_size=8,
        vocab_size=50272,
        max_position_embeddings=256,
    )
    device = torch.device("cpu")
    for requests, num_beams in ((1, 5), (8, 16)):
        options = GenerationOptions(
            end_id=50118, num_beams=num_beams, early_stopping=num_beams == 5
        )
        texts = [torch.tensor([3])] * requests
        search = cuda_decoding.CudaBeamSearch(options, texts, config.vocab_size, device)
        search.advance(torch.empty(search.rows, config.vocab_size, device="meta"))
        cache = cuda_cache.CudaCache(config, search.rows, 256, device)
        cache.reset(torch.full((requests,), 40), num_beams)
        cache.reorder(torch.zeros(search.rows, dtype=torch.int64))


if __name__ == "__main__":
    main(int(sys.argv[1]))
