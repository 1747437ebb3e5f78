"""`qat convert-q4-to-q2`: a 4-bit student to one whose MLP layers have 2 bits."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from qat.cli.command import run_command
from qat.pipelines.quantize_config import ConvertQ4ToQ2Config, require_other
from qat.tracking.messages import say


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat convert-q4-to-q2", ConvertQ4ToQ2Config, act, argv)


def act(config: ConvertQ4ToQ2Config) -> dict[str, Any]:
    """Open the student, fit its MLP layers anew, measure, write."""
    from qat.model.load import vocabulary_size
    from qat.pipelines.open_checkpoint import latent_or_base_weights, open_checkpoint
    from qat.pipelines.q4_to_q2 import q2_scheme
    from qat.pipelines.recipe import finished, recipe
    from qat.pipelines.students import already_made, measure_and_write, open_cache, write_student
    from qat.quant.scheme import Scheme
    from qat.runtime.device import Device

    started = time.perf_counter()
    device = Device.detect(config.device)
    dtype = device.dtype_from_name(config.dtype)
    say(device.describe())
    opened = open_checkpoint(config.q4_checkpoint, model_id=config.model_id)
    require_other("--q4-checkpoint", opened.path, config.output)
    header = require_student(config, opened)
    scheme = q2_scheme(Scheme.from_dict(header.scheme), config)
    base = base_of(config, header)
    cache = open_cache(
        config.cache_dir, opened.text_folder, vocabulary_size(opened.text_folder), base["weights"]
    )
    fingerprint = cache and cache.fingerprint
    made_by = recipe(
        "convert-q4-to-q2", config, q4=header.sha256, base=base["weights"], cache=fingerprint
    )
    done = finished(config.output, made_by)
    if done is not None:
        return already_made(config.output, done)
    weight_of = latent_or_base_weights(opened, base)
    student = convert(config, opened, scheme, base, cache, device, dtype)
    header = replace(
        header,
        scheme=scheme.to_dict(),
        base_model=base,
        cache_fingerprint=fingerprint,
        made_by=made_by,
    )
    return measure_and_write(
        student,
        header,
        config.output,
        cache=cache if config.eval else None,
        write=partial(write_student, text_source=opened.text_folder, weight_of=weight_of),
        started=started,
        device=device,
        dtype=dtype,
    )


def require_student(config: ConvertQ4ToQ2Config, opened: Any) -> Any:
    """Return the header of the 4-bit student.

    Raises:
        ValueError: If the checkpoint is a full-precision model.
    """
    if opened.header is None:
        raise ValueError(
            f"--q4-checkpoint {config.q4_checkpoint} is a full-precision model; "
            "`qat init-student` makes a 4-bit student of it"
        )
    rank = opened.header.scheme["attention"]["rank"]
    if config.q4_rank not in (None, rank):
        say(f"--q4-rank {config.q4_rank}: the checkpoint's attention scales have rank {rank}")
    return opened.header


def base_of(config: ConvertQ4ToQ2Config, header: Any) -> dict[str, str]:
    """Return path, name and weights' hash of the full-precision model; what is known of one gone.

    Raises:
        ValueError: If the path that the 4-bit student names holds other weights by now.
    """
    from qat.model.load import model_identity

    path = config.model_id or header.base_model["path"]
    try:
        found = {"path": path, **model_identity(path)}
    except FileNotFoundError:
        if config.model_id is not None:
            raise
        return header.base_model
    made_from = header.base_model.get("weights", found["weights"])
    if config.model_id is None and found["weights"] != made_from:
        raise ValueError(
            f"{path} holds other weights than {config.q4_checkpoint} was made from; "
            "give its full-precision model with --model-id"
        )
    return found


def convert(
    config: ConvertQ4ToQ2Config,
    opened: Any,
    scheme: Any,
    base: dict[str, str],
    cache: Any,
    device: Any,
    dtype: Any,
) -> Any:
    """Return the converted student, on the CPU."""
    from qat.model.checkpoint import dense_parts_in
    from qat.pipelines import q4_to_q2
    from qat.pipelines.open_checkpoint import latent_or_base_weights, load_model
    from qat.pipelines.students import calibrate, calibration_tokens, loss_weights
    from qat.quant.scheme import Scheme

    student, header = load_model(opened.path, model_id=config.model_id)
    schemes = q4_to_q2.layers_to_fit(student, Scheme.from_dict(header.scheme), scheme)
    weight_of = q4_to_q2.weights_to_fit(student, latent_or_base_weights(opened, base))
    q4_to_q2.check_weights(schemes, weight_of)
    model = load_base(base["path"], dtype)
    count = config.num_calibration_sequences(cache.seq_len) if cache is not None else 0
    with dense_parts_in(student, dtype):
        if config.fit != "moments" and cache is not None:
            place = device.eager()
            batches = calibration_tokens(cache, count, place)
            if model is not None:
                place.place(model)
            with place.hosting(student):
                q4_to_q2.convert_layers_by_blocks(
                    student,
                    model,
                    schemes,
                    batches,
                    weight_of=weight_of,
                    token_weights=loss_weights(config.fit, model or student, schemes, batches),
                    dtype=dtype,
                )
        else:
            watched = q4_to_q2.matching_layers(model or student, student, schemes)
            moments = calibrate(model or student, watched, cache, count, device)
            q4_to_q2.convert_layers(student, schemes, weight_of=weight_of, importance=moments)
    q4_to_q2.widen_attention(student, scheme.attention)
    return student


def load_base(path: str, dtype: Any) -> Any:
    """Return the full-precision model at a path, None where it is gone."""
    from qat.model.load import load_dense

    try:
        return load_dense(path, dtype=dtype)
    except FileNotFoundError:
        say(f"no full-precision model at {path}: fitting to the student's own weights")
        return None
