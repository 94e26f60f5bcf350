"""What commands share to declare their arguments and options."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer


def opt(default: Any, text: str, *names: str, panel: str | None = None, **more: Any) -> Any:
    """Declare an option."""
    return typer.Option(default, *names, help=text, rich_help_panel=panel, **more)


def arg(default: Any, text: str, metavar: str) -> Any:
    """Declare an argument."""
    return typer.Argument(default, help=text, metavar=metavar)


def out_opt(default: Any, text: str, metavar: str | None = None) -> Any:
    """Declare the option that names what a command writes."""
    return opt(default, text, "--out", "-o", metavar=metavar)


# Arguments and options of several commands; the others are declared where they are used.
Model = Annotated[
    Path, typer.Argument(help="Run folder, checkpoint, .onnx, .engine or .safetensors file.", metavar="MODEL")
]
Layout = Annotated[str | None, typer.Option(help="Data set layout. Default: detected; pmm data -h lists the layouts.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or N. Default: a usable GPU.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def parameters_of(parameters: dict[str, Any], *others: str) -> dict[str, Any]:
    """The parameters of a command that its public function takes as well: all but `as_json` and `others`."""
    return {name: value for name, value in parameters.items() if name not in ("as_json", *others)}


def with_flags(config: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace `**settings` of a command by an option for each field of a dataclass that has a help text."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        *parameters, _ = inspect.signature(command).parameters.values()
        kinds = get_type_hints(config)
        for setting in fields(config):
            if text := setting.metadata.get("help"):
                if limits := setting.metadata.get("range"):
                    text = f"{text}, {limits[0]} to {limits[1]}. Default: {setting.default}."
                option = opt(None, text, panel=setting.metadata.get("panel"))
                kind = kinds[setting.name] | None
                keyword = inspect.Parameter.KEYWORD_ONLY
                parameters.append(inspect.Parameter(setting.name, keyword, default=option, annotation=kind))
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


FOREIGN_FLAGS = {
    "--imgsz": "The input size is set in training: pmm train --height and --width",
    "--half": "Use --precision fp16",
    "--int8": "Use --precision int8",
    "--format": "pmm export writes ONNX; add --trt or --rtx for TensorRT, --safetensors for PyTorch",
    "--input": "Use --input-form",
    "--output": "Use --out",
    "--batch-size": "Use --batch (training), --batch-sizes (bench) or --batch-profile (TensorRT)",
    "--lr0": "Use --lr",
    "--weights": "Name the model as an argument; training starts from one with --init-from",
}
"""Options of other tools and earlier versions, with a remedy that names ours."""
