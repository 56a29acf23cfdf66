"""Serve BLIP-2 over HTTP: OpenAI's chat completions, and a page to ask on.

    python serve.py --engine_dir Salesforce/blip2-opt-2.7b --opt_engine_dir Salesforce/blip2-opt-2.7b
    BLIP2_API_KEY=… python serve.py --host 0.0.0.0 --port 8000
    python serve.py --ray        # a replica on every GPU of this machine

docs/serving.md has the rest: what clients can ask for, keys, limits, metrics.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from blip2 import cli
from blip2.errors import Blip2Error
from blip2.serving.client import KEY_VARIABLE
from blip2.serving.engine_process import EngineSettings

if TYPE_CHECKING:
    from blip2.serving.app import ServiceSettings


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser("Serve BLIP-2 over HTTP, with OpenAI's API and a page to ask on.")
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all")
    add("--port", type=cli.int_between(0, 65535), default=8000, help="0: any that is free")
    add(
        "--api_key",
        action="append",
        metavar="KEY",
        help=f"that requests must bring; may be given several times (default: {KEY_VARIABLE}, where"
        " a comma separates keys; none: nobody needs one)",
    )
    add("--model_name", default="blip2", help="what /v1/models calls it")
    add(
        "--allow_image_urls",
        action="store_true",
        help="fetch pictures from public http(s) addresses, not only take data: URLs",
    )
    add(
        "--max_waiting",
        type=cli.non_negative_int,
        default=256,
        help="answers that may wait for rows; more get 429",
    )
    add("--max_body_mb", type=cli.positive_float, default=20, help="largest request, in MiB")
    seconds = {
        "request_timeout": (60, "longest answer, from the end of its request"),
        "body_timeout": (20, "longest time for a request to arrive"),
        "idle_timeout": (15, "longest time for a connection to ask nothing"),
        "picture_timeout": (10, "longest time to decode a picture"),
        "shutdown_timeout": (30, "longest time to finish what runs, after SIGTERM"),
    }
    for name, (default, what) in seconds.items():
        add(f"--{name}", type=cli.positive_float, default=default, metavar="S", help=what)
    add("--max_beams", type=cli.positive_int, default=10, help="of a beam search, at most")
    add(
        "--max_output_len",
        type=cli.positive_int,
        default=64,
        help="longest answer, in tokens, whatever a request asks for",
    )
    add(
        "--max_txt_len",
        type=cli.positive_int,
        help="longest prompt, in tokens (default: 128, or what the engine has room for)",
    )
    add(
        "--max_rows",
        type=cli.int_between(1, 4096),
        help="answers at once (default: by the engines)",
    )
    add(
        "--workers",
        type=cli.int_between(1, 256),
        help="processes that decode pictures (default: all processors but two, at most 16)",
    )
    add(
        "--http_processes",
        type=cli.int_between(1, 64),
        help="processes that speak HTTP (default: one for every four processors, at most 4)",
    )
    add(
        "--query_tokens",
        help="saved by onnx_export.py (default: query_tokens.pt in or beside --engine_dir)",
    )
    add("--engine_dir", help="ViT and Q-Former, as for run.py (default: plan, else onnx)")
    add(
        "--opt_engine_dir",
        help="OPT, as for run.py (default: trt_engine/blip-2-opt-2.7b/fp16/1-gpu, else"
        " opt/2.7B/trt_ckpt/fp16/1-gpu)",
    )
    add(
        "--hf_model_location",
        help="tokenizer: directory or hub id (default: the checkpoint's, or by the query tokens)",
    )
    add(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="a replica on every GPU of a Ray cluster; without an address, of this machine",
    )
    add(
        "--ray_replicas", type=cli.positive_int, metavar="N", help="with --ray (default: one a GPU)"
    )
    add(
        "--ray_autoscaling",
        type=json_object,
        metavar="JSON",
        help="with --ray: Ray Serve's autoscaling_config, as"
        ' \'{"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 64}\'',
    )
    add("--no_verify", action="store_true", help="do not compare large files with their hashes")
    args = parser.parse_args()
    for name in ("ray_replicas", "ray_autoscaling"):
        if getattr(args, name) is not None and not args.ray:
            parser.error(f"--{name} goes with --ray")
    if args.ray_replicas and args.ray_autoscaling is not None:
        parser.error("--ray_replicas goes without --ray_autoscaling")
    return args


def json_object(text: str) -> dict[str, Any]:
    """argparse type: a JSON object."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return found


def main() -> None:
    args = parse_arguments()
    if sys.platform != "linux":  # shared memory and descriptors go from process to process
        raise Blip2Error(
            "the server runs on Linux alone", "run it in a container, or in WSL on Windows"
        )
    from blip2.serving.together import metrics_together

    # Ray's replicas are processes enough.
    processes = 1 if args.ray else args.http_processes or default_http_processes()
    with metrics_together() if processes > 1 else contextlib.nullcontext():
        serve_in(processes, args)


def default_http_processes() -> int:
    """One for every four processors, at most 4: the decoders and the engines need the others."""
    from blip2 import cpu

    return max(1, min(4, cpu.cores() // 4))


def default_workers() -> int:
    """All processors but two, at most 16: who asks waits for pictures, and engines go before them."""
    from blip2 import cpu

    return max(1, min(16, cpu.cores() - 2))


def serve_in(processes: int, args: argparse.Namespace) -> None:
    """Serve with so many processes that speak HTTP."""
    from blip2.serving.app import ServiceSettings
    from blip2.serving.front import is_loopback
    from blip2.serving.server import ServerSettings, serve

    keys = api_keys(args.api_key)
    service = ServiceSettings(
        model=args.model_name,
        api_keys=keys,
        takes_urls=args.allow_image_urls,
        max_waiting=args.max_waiting,
        max_body=int(args.max_body_mb * (1 << 20)),
        body_timeout=args.body_timeout,
        request_timeout=args.request_timeout,
        picture_timeout=args.picture_timeout,
        decoders=args.workers or default_workers(),
        is_local=is_loopback(args.host) and not keys,
    )
    if args.ray:
        serve_on_ray(args, service)
        return
    settings = ServerSettings(
        service,
        engine_settings(args),
        args.host,
        args.port,
        args.idle_timeout,
        args.shutdown_timeout,
        processes,
    )
    serve(settings)


def serve_on_ray(args: argparse.Namespace, service: ServiceSettings) -> None:
    """Serve with replicas."""
    from blip2.serving.replicas import ReplicaSettings, serve_replicas

    serve_replicas(
        ReplicaSettings(
            service,
            engine_settings(args),
            args.ray,
            args.host,
            args.port,
            args.shutdown_timeout,
            args.ray_replicas,
            args.ray_autoscaling,
        )
    )


def engine_settings(args: argparse.Namespace) -> EngineSettings:
    """What the process with the engines opens."""
    places = {
        "engine_dir": args.engine_dir,
        "opt_engine_dir": args.opt_engine_dir,
        "query_tokens": args.query_tokens,
        "tokenizer": args.hf_model_location,
    }
    return EngineSettings(
        places,
        not args.no_verify,
        args.max_txt_len,
        args.max_output_len,
        args.max_beams,
        args.max_rows,
    )


def api_keys(given: list[str] | None) -> tuple[str, ...]:
    """The keys of the command line, else of the environment.

    Raises:
        Blip2Error: one is empty, or could not be sent in a header.
    """
    if given is None:
        from_environment = os.environ.get(KEY_VARIABLE)
        given = from_environment.split(",") if from_environment else []
    keys = tuple(key.strip() for key in given)
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise Blip2Error(
                "a key is empty, or has blanks or letters beyond ASCII in it",
                f"give another `api_key` or {KEY_VARIABLE}",
            )
    return keys


def program() -> NoReturn:
    """Start it, and exit."""
    cli.run(main)
