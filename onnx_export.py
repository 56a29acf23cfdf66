"""Export BLIP-2's ViT and Q-Former to ONNX, and save the picture, query tokens and tokenizer.

    python onnx_export.py                                   # Salesforce/blip2-opt-2.7b, float16
    python onnx_export.py --model_dir demo/checkpoint --image demo/scene.png --output_dir demo/out

Writes, under --output_dir:
    onnx/visual_encoder/visual_encoder.onnx     input → output
    onnx/Qformer/Qformer.onnx                   query_tokens, image_embeds, image_atts → query_output
    image.pt   query_tokens.pt   tokenizer/tokenizer.json
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from blip2 import cli

if TYPE_CHECKING:
    from blip2.vision import export

MERLION = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/assets/merlion.png"


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser("Export BLIP-2's ViT and Q-Former to ONNX.")
    parser.add_argument(
        "--model_dir",
        default="Salesforce/blip2-opt-2.7b",
        help="BLIP-2 checkpoint: a directory or a Hugging Face id",
    )
    parser.add_argument("--image", default=MERLION, help="picture to save as image.pt: file or URL")
    parser.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="precision of the ViT, and of the Q-Former's inputs and output",
    )
    parser.add_argument(
        "--qformer_dtype",
        choices=("float16", "float32"),
        default="float32",
        help="precision the Q-Former computes in",
    )
    parser.add_argument(
        "--opset",
        type=int,
        choices=(18, 23),
        default=18,
        help="ONNX operator set; 23 keeps attention and GELU as one node each",
    )
    parser.add_argument(
        "--output_dir", default=".", help="where onnx/, image.pt, query_tokens.pt, tokenizer/ go"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()

    # Imported after the arguments are parsed, so that --help does not wait for torch.
    import torch

    from blip2 import artifacts, images, prompts
    from blip2.checkpoints import open_checkpoint
    from blip2.vision import export
    from blip2.vision.onnx_runtime import QFORMER_FILE, VIT_FILE

    checkpoint = open_checkpoint(args.model_dir)
    preprocessing = images.Preprocessing.of(checkpoint)
    tokenizer = prompts.load_tokenizer(checkpoint.directory)
    pixel_values = images.pixel_values(images.load_image(args.image), preprocessing)[None]
    query_tokens = checkpoint.tensor("query_tokens").float()
    dtype, qformer_dtype = (getattr(torch, name) for name in (args.dtype, args.qformer_dtype))

    output_dir = Path(args.output_dir)
    source = {"source": {"model": args.model_dir, "fingerprint": checkpoint.fingerprint}}
    with artifacts.staging(output_dir) as stage:
        vit = stage / "onnx" / VIT_FILE
        image_embeds, differences = export.export_vit(
            checkpoint, pixel_values, dtype, vit, args.opset
        )
        export.write_sidecar(vit, **source, preprocessing=dataclasses.asdict(preprocessing))
        report(output_dir / "onnx" / VIT_FILE, vit, differences)

        qformer = stage / "onnx" / QFORMER_FILE
        differences = export.export_qformer(
            checkpoint, query_tokens, image_embeds, dtype, qformer_dtype, qformer, args.opset
        )
        export.write_sidecar(qformer, **source, compute_dtype=args.qformer_dtype)
        report(output_dir / "onnx" / QFORMER_FILE, qformer, differences)

        for name, tensor in (("image.pt", pixel_values), ("query_tokens.pt", query_tokens)):
            torch.save(tensor, stage / name)
            artifacts.write_sidecar(stage / name, **source, shape=list(tensor.shape))
        tokenizer.save(stage / "tokenizer")
    print(f"{output_dir / 'image.pt'}, query_tokens.pt, tokenizer/: saved")


def report(target: Path, written: Path, differences: list[export.Difference]) -> None:
    """One line a file: its size, and how far ONNX Runtime on it is from float32 PyTorch."""
    size = sum(file.stat().st_size for file in written.parent.glob(f"{written.name}*"))
    checks = ", ".join(
        f"batch {d.batch_size}: relative error {d.relative:.1e}, cosine {d.cosine:.6f}"
        for d in differences
    )
    print(f"{target}: {size / 1e6:.1f} MB; ONNX Runtime against PyTorch float32, {checks}")


if __name__ == "__main__":
    cli.run(main)
