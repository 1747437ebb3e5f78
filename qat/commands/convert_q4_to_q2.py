"""`qat convert-q4-to-q2`: a 4-bit student to one whose MLP layers have 2 bits."""

import time
from collections.abc import Sequence
from typing import Any

from qat.commands.door import run_command, say
from qat.convert.config import ConvertQ4ToQ2Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat convert-q4-to-q2", ConvertQ4ToQ2Config, act, argv)


def act(config: ConvertQ4ToQ2Config) -> dict[str, Any]:
    """Load both models, calibrate, fit the MLP layers, measure, write."""
    from dataclasses import replace

    from qat.commands.students import (
        already_made,
        calibrate,
        calibration_tokens,
        measure_and_write,
        open_cache,
    )
    from qat.convert.by_blocks import check_weights
    from qat.convert.q4_to_q2 import (
        convert_mlp_layers,
        convert_mlp_layers_by_blocks,
        mlp_linears,
        q2_scheme,
    )
    from qat.convert.recipe import finished, recipe
    from qat.device import Device
    from qat.model.checkpoint import read_header
    from qat.model.load import (
        checkpoint_folder,
        load_dense,
        load_model,
        load_tokenizer,
        vocabulary_size,
    )
    from qat.model.surgery import check_scheme
    from qat.quant.scheme import Scheme

    started = time.perf_counter()
    device = Device.detect(config.device)
    dtype = device.dtype_from_name(config.dtype)
    say(device.describe())
    source = checkpoint_folder(config.q4_checkpoint)
    header = read_header(source)
    base_path, identity = base_of(config, header)
    cache = open_cache(
        config.cache_dir, load_tokenizer(source), vocabulary_size(source), identity["weights"]
    )
    made_by = recipe(
        "convert-q4-to-q2",
        config,
        q4=header.sha256,
        base=identity["weights"],
        cache=cache and cache.fingerprint,
    )
    done = finished(config.output, made_by)
    if done is not None:
        return already_made(config.output, done)
    base = load_dense(base_path, dtype=dtype)
    scheme = q2_scheme(Scheme.from_dict(header.scheme), config)
    check_scheme(base, scheme)
    student, _header = load_model(source, dtype=dtype)
    linears = mlp_linears(base, student)
    check_weights(linears, scheme.layer)
    count = config.num_calibration_sequences(cache.seq_len) if cache is not None else 0
    if config.fit == "hessian" and cache is not None:
        batches = calibration_tokens(cache, count, device)
        base.to(device.torch_device)
        student.to(device.torch_device)
        convert_mlp_layers_by_blocks(student, base, linears, scheme.mlp, batches, dtype=dtype)
        student.to("cpu")
    else:
        convert_mlp_layers(
            student,
            scheme.mlp,
            weight_of=lambda name, _layer: linears[name].weight,
            importance=calibrate(base, linears, cache, count, device),
        )
    header = replace(
        header,
        scheme=scheme.to_dict(),
        base_model={"path": base_path, **identity},
        cache_fingerprint=cache and cache.fingerprint,
        made_by=made_by,
    )
    return measure_and_write(
        student,
        header,
        config.output,
        cache=cache if config.eval else None,
        text_source=source,
        started=started,
        device=device,
        dtype=dtype,
    )


def base_of(config: ConvertQ4ToQ2Config, header: Any) -> tuple[str, dict[str, str]]:
    """Return the path and identity of the full-precision model to fit to.

    Raises:
        ValueError: If the path that the 4-bit student names holds other weights by now.
    """
    from qat.model.load import model_identity

    path = config.model_id or header.base_model["path"]
    identity = model_identity(path)
    made_from = header.base_model.get("weights", identity["weights"])
    if config.model_id is None and identity["weights"] != made_from:
        raise ValueError(
            f"{path} holds other weights than {config.q4_checkpoint} was made from; "
            "give its full-precision model with --model-id"
        )
    return path, identity
