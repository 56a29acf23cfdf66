"""Export BLIP-2's ViT and Q-Former to ONNX, and save the picture, query tokens and tokenizer.

    python onnx_export.py                                   # Salesforce/blip2-opt-2.7b, float16
    python onnx_export.py --model_dir demo/checkpoint --image demo/scene.png --output_dir demo/out
    python onnx_export.py --model_dir blip2_pretrained_opt2.7b.pth      # LAVIS's, as it is on disk
    python onnx_export.py --source lavis --model_dir caption_coco_opt2.7b     # LAVIS downloads it

Writes, under --output_dir:
    onnx/visual_encoder/visual_encoder.onnx     input → output
    onnx/Qformer/Qformer.onnx                   query_tokens, image_embeds, image_atts → query_output
    image.pt   query_tokens.pt   tokenizer/tokenizer.json
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from blip2 import cli
from blip2.errors import Blip2Error

if TYPE_CHECKING:
    from blip2.checkpoints import Checkpoint
    from blip2.vision import export

DEFAULT_MODELS = {"huggingface": "Salesforce/blip2-opt-2.7b", "lavis": "pretrain_opt2.7b"}
# What --dtype may be, by torch's names.
DTYPES = {"float16": "float16", "float32": "float32", "int8": "int8", "float8": "float8_e4m3fn"}
TOKENIZER_FILE = "tokenizer/tokenizer.json"
MERLION = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/assets/merlion.png"


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser("Export BLIP-2's ViT and Q-Former to ONNX.")
    parser.add_argument(
        "--source",
        choices=tuple(DEFAULT_MODELS),
        default="huggingface",
        help="lavis: have salesforce-lavis, in its own environment, download and build the model",
    )
    parser.add_argument(
        "--model_dir",
        help="BLIP-2 checkpoint: a directory, a Hugging Face id or a .pth of LAVIS; with --source"
        f" lavis one of its model types (default: {' or '.join(DEFAULT_MODELS.values())})",
    )
    parser.add_argument(
        "--hf_model_location",
        help="tokenizer: directory or hub id (default: the checkpoint's; facebook's OPT for LAVIS)",
    )
    parser.add_argument("--image", default=MERLION, help="picture to save as image.pt: file or URL")
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="float16",
        help="precision of the ViT, and of the Q-Former's inputs and output; int8, for CPUs only:"
        " the ViT's linear layers, dynamically quantised, and float32 for all else; float8, for"
        " GPUs from Ada on only: so too, where the error is small, and float16 for all else",
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
        help="ONNX operator set; 23 keeps attention and GELU as one node each (default: 18; 23 for"
        " float8, which 18 has not)",
    )
    parser.add_argument(
        "--output_dir", default=".", help="where onnx/, image.pt, query_tokens.pt, tokenizer/ go"
    )
    args = parser.parse_args()
    args.model_dir = args.model_dir or DEFAULT_MODELS[args.source]
    if args.dtype == "float8" and args.opset == 18:
        parser.error("--dtype float8 needs --opset 23: ONNX has no FP8 in 18")
    args.opset = args.opset or (23 if args.dtype == "float8" else 18)
    return args


def main() -> None:
    args = parse_arguments()

    # Imported after the arguments are parsed, so that --help does not wait for torch.
    import torch

    from blip2 import artifacts, images, prompts
    from blip2.checkpoints import TokenIds, lavis_checkpoint, open_checkpoint
    from blip2.checkpoints.tokenizer import FILES as TOKENIZER_FILES
    from blip2.layout import PICTURE, QFORMER_ONNX, QUERY_TOKENS, TOKENIZER, VIT_ONNX
    from blip2.vision import export, modules

    open_model = lavis_checkpoint if args.source == "lavis" else open_checkpoint
    checkpoint = open_model(args.model_dir)
    modules.check_checkpoint(checkpoint)
    preprocessing = images.Preprocessing.of(checkpoint)
    tokenizer = prompts.load_tokenizer(
        tokenizer_location(args.hf_model_location, checkpoint), TokenIds.of(checkpoint)
    )
    picture = images.load_image(args.image)
    pixel_values = images.pixel_values(picture, preprocessing)[None]
    query_tokens = checkpoint.tensor("query_tokens").float()
    dtype, qformer_dtype = getattr(torch, DTYPES[args.dtype]), getattr(torch, args.qformer_dtype)

    output_dir = Path(args.output_dir)
    graphs = [f"onnx/{VIT_ONNX}", f"onnx/{QFORMER_ONNX}"]
    described = [*graphs, PICTURE, QUERY_TOKENS]
    sidecars = [str(artifacts.sidecar_path(Path(file))) for file in described]
    files = [*described, *sidecars, *(f"{graph}.data" for graph in graphs), TOKENIZER_FILE]
    artifacts.refuse_same(
        {str(output_dir / file): output_dir / file for file in files},
        {
            "--image": [args.image],
            "--hf_model_location": [
                Path(args.hf_model_location, name)
                for name in (TOKENIZER_FILES if args.hf_model_location else ())
            ],
        },
    )
    source = {"source": {"model": args.model_dir, "fingerprint": checkpoint.fingerprint}}
    with artifacts.staging(output_dir, files, is_tokenizer_of_export) as stage:
        vit = stage / "onnx" / VIT_ONNX
        exported = export.export_vit(checkpoint, pixel_values, dtype, vit, args.opset)
        export.write_sidecar(
            vit,
            **source,
            compute_dtype=args.dtype,
            preprocessing=dataclasses.asdict(preprocessing),
            **exported.facts,
        )
        lines = [report(output_dir / "onnx" / VIT_ONNX, vit, exported.differences)]
        if args.dtype == "float8":
            lines.append(report_layers(**exported.facts["float8"]))

        qformer = stage / "onnx" / QFORMER_ONNX
        exported = export.export_qformer(
            *(checkpoint, query_tokens, exported.references),
            *(export.dtype_between(dtype), qformer_dtype, qformer, args.opset),
        )
        export.write_sidecar(qformer, **source, compute_dtype=args.qformer_dtype, **exported.facts)
        lines.append(report(output_dir / "onnx" / QFORMER_ONNX, qformer, exported.differences))

        for name, tensor in ((PICTURE, pixel_values), (QUERY_TOKENS, query_tokens)):
            artifacts.save_tensor(tensor, stage / name)
            artifacts.write_sidecar(stage / name, **source, shape=list(tensor.shape))
        tokenizer.save(stage / TOKENIZER)
    print(*lines, sep="\n")
    print(f"{output_dir / 'image.pt'}, query_tokens.pt, tokenizer/: saved")


def tokenizer_location(given: str | None, checkpoint: Checkpoint) -> str | Path:
    """Where the tokenizer is: as given, else where the checkpoint's OPT is."""
    location = given or checkpoint.opt_location
    if location is None:
        raise Blip2Error(
            f"{checkpoint.path} is for no OPT that facebook published",
            "give --hf_model_location the directory of its OPT, for the tokenizer",
        )
    return location


def is_tokenizer_of_export(path: Path) -> bool:
    """Whether this is the tokenizer beside query tokens that were exported: it has no sidecar."""
    from blip2 import artifacts

    output_dir = path.parent.parent
    return path == output_dir / TOKENIZER_FILE and artifacts.is_described(
        output_dir / "query_tokens.pt"
    )


def report(target: Path, written: Path, differences: list[export.Difference]) -> str:
    """One line a file: its size, and how far ONNX Runtime on it is from float32 PyTorch."""
    size = sum(file.stat().st_size for file in written.parent.glob(f"{written.name}*"))
    checks = ", ".join(
        f"batch {d.batch_size}: relative error {d.relative:.1e}, cosine {d.cosine:.6f}"
        for d in differences
    )
    return f"{target}: {size / 1e6:.1f} MB; ONNX Runtime against PyTorch float32, {checks}"


def report_layers(layers: list[int], float16_layers: list[int], errors: list[float]) -> str:
    """One line: how far layers in FP8 are off, and which stay in float16."""
    line = f"ViT: {len(layers)} of {len(errors)} layers in FP8, off by up to"
    line += f" {max(errors[index] for index in layers):.1%}"
    if not float16_layers:
        return line
    kept = ", ".join(f"{index} ({errors[index]:.1%})" for index in float16_layers)
    return f"{line}; in float16, where FP8 would take them further: {kept}"


def program() -> NoReturn:
    """Start it, and exit."""
    cli.run(main)
