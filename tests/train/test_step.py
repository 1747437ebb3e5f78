import copy
import shutil
import weakref
from dataclasses import replace

import pytest
import torch

from qat.distill.candidates import draw_negatives, with_negatives
from qat.distill.kl import forward_kl
from qat.distill.teacher import dense_signal, top_k_signal
from qat.model.head import hidden_states, logits_of
from qat.model.layers import FakeQuantLinear, FakeQuantWeight
from qat.model.surgery import hold_weights, quantized_layers, release_weights
from qat.quant.fit import fit_weight
from qat.quant.spec import make_spec
from qat.train.step import (
    Batch,
    Trainer,
    form_weights,
    loss_scaler,
    pull_gradients,
    token_layers,
)
from qat.train.trainable import (
    choose_trainable,
    compile_decoder_layers,
    enable_gradient_checkpointing,
    make_optimizer,
    trained_layers,
)
from tests.tiny import TINY_MODELS, VOCAB_SIZE, quantize_plainly, tiny_llama, tiny_student

PARTS = ("weights", "scales", "codebooks", "norms")
KINDS = ("mlp", "attention")


def batch(seed=0, *, rows=4, length=8, ratio=0.7):
    """Return a micro-batch with its teacher, and positions that do not count."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(261, (rows, length), generator=generator)
    mask = torch.rand(rows, length - 1, generator=generator) < ratio
    return Batch.of(token_ids, top_k_signal(tiny_llama()(token_ids).logits[:, :-1], mask, 12))


def parts_of(made):
    """Return token ids and signal of a micro-batch."""
    return made.token_ids, made.unpack()


def joined(batches):
    """Return micro-batches as one."""
    token_ids = torch.cat([batch.token_ids for batch in batches])
    logits = tiny_llama()(token_ids).logits[:, :-1]
    return Batch.of(
        token_ids, top_k_signal(logits, torch.cat([batch.mask for batch in batches]), 12)
    )


def make_trainer(student, parts=PARTS, kinds=KINDS, *, lr=1e-3, dtype=torch.float32, **changes):
    """Return what takes steps on a student."""
    chosen = choose_trainable(student, kinds=kinds, parts=parts, weight_of=lambda _name: None)
    hold_weights(student, dtype)
    settings = {
        "model": student,
        "layers": trained_layers(student),
        "optimizer": make_optimizer(chosen, dict.fromkeys(chosen, lr), 0.0),
        "divergence": forward_kl,
        "dtype": dtype,
        "clip_grad_norm": 0.0,
        "sync": lambda: None,
    }
    return Trainer(**{**settings, **changes})


def gradients(student):
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, tolerance):
    """Equal but for the order of float32 sums, relative to each tensor's size."""
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = float(expected[name].abs().max())
        assert torch.allclose(gradient, expected[name], rtol=0, atol=tolerance * scale), name


def nudge(student, seed=0):
    """Move what trains a little, so that it lies off the grid that it started from."""
    generator = torch.Generator().manual_seed(seed)
    for layer in quantized_layers(student).values():
        if layer.latent_weight is not None:
            noise = torch.randn(layer.latent_weight.shape, generator=generator)
            layer.latent_weight.data += 0.02 * noise
        layer.codebook.data += 0.02 * torch.randn(layer.codebook.shape, generator=generator)


@pytest.mark.parametrize("parts", [PARTS, ("scales", "codebooks"), ("weights",), ("scales",)])
@pytest.mark.parametrize(
    ("family", "plan"), [("llama", "q2a4"), ("qwen3", "q4_r4"), ("gemma", "q2a4_int_g32")]
)
def test_one_pull_a_step_equals_plain_autograd(family, plan, parts):
    """Weights formed once and gradients pulled once: what autograd through each layer gives."""
    student = tiny_student(family, plan)
    trainer = make_trainer(student, parts)
    nudge(student)
    token_ids, signal = parts_of(batch())
    form_weights(trainer.layers, torch.float32)
    loss = trainer.accumulate([Batch.of(token_ids, signal)], None)
    pull_gradients(trainer.layers)
    found = gradients(student)
    student.zero_grad(set_to_none=True)

    release_weights(student)
    logits = student(token_ids, use_cache=False).logits[:, :-1]
    plain = forward_kl(logits, signal)[signal.mask].mean()
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert_same_gradients(found, gradients(student), 1e-4)


@pytest.mark.parametrize("stored_dtype", ["float16", "float32"])
def test_gradients_are_taken_at_the_codebook_that_the_forward_used(stored_dtype):
    """Values stored in float32 were rounded to float16 for the backward pass only."""
    plan = make_spec(bits=3, group_size=8, stored_dtype=stored_dtype)
    linear = torch.nn.Linear(16, 12, bias=False)
    layer = FakeQuantLinear.from_linear(linear, fit_weight(linear.weight, plan))
    layer.codebook.data *= 1.0001
    layer.scale.data *= 1.0001
    gradient = torch.randn(12, 16)
    layer.fake_quantized_weight().backward(gradient)
    expected = gradients(layer)
    layer.zero_grad(set_to_none=True)
    form_weights([layer], torch.float32)
    layer.held_weight.grad = gradient
    pull_gradients([layer])
    for name, found in gradients(layer).items():
        assert torch.equal(found, expected[name]), name


def test_micro_batches_add_up_to_one_batch():
    """Every counted position weighs the same, whichever micro-batch it is in; one may be empty."""
    student = tiny_student()
    trainer = make_trainer(student)
    batches = [batch(1, ratio=0.9), batch(2, rows=2, ratio=0.3), batch(3, rows=1, ratio=0.0)]
    results = []
    for parts in (batches, [joined(batches)]):
        form_weights(trainer.layers, torch.float32)
        loss = trainer.accumulate(parts, None)
        pull_gradients(trainer.layers)
        results.append((loss.item(), gradients(student)))
        student.zero_grad(set_to_none=True)
    (loss, found), (whole, expected) = results
    assert loss == pytest.approx(whole, rel=1e-6)
    assert_same_gradients(found, expected, 1e-5)


def test_the_loss_is_the_mean_over_counted_positions():
    """In nats a token: what the evaluation of the same positions says."""
    student = tiny_student()
    trainer = make_trainer(student)
    token_ids, signal = parts_of(batch())
    with torch.no_grad():
        values = forward_kl(student(token_ids).logits[:, :-1], signal)
    loss, _norm = trainer.step([Batch.of(token_ids, signal)], 1.0)
    assert loss.item() == pytest.approx(values[signal.mask].mean().item(), rel=1e-5)


def test_a_batch_of_padding_does_no_harm():
    """Nothing counts: loss and gradients are zero, nothing becomes NaN."""
    student = tiny_student()
    trainer = make_trainer(student)
    before = copy.deepcopy(student.state_dict())
    loss, norm = trainer.step([batch(ratio=0.0)], 1.0)
    assert loss == 0
    assert norm == 0
    after = student.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("parts", "kinds", "moving"),
    [
        (("weights",), KINDS, {"latent_weight"}),
        (("scales",), ("mlp",), {"scale"}),
        (("codebooks",), ("attention",), {"codebook"}),
        (("norms",), KINDS, {"weight"}),
        (("weights", "scales"), ("mlp",), {"latent_weight", "scale"}),
    ],
)
def test_only_what_was_chosen_moves(parts, kinds, moving):
    """Everything else is the same to the bit after three steps."""
    student = tiny_student()
    trainer = make_trainer(student, parts, kinds)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for seed in range(3):
        trainer.step([batch(seed)], 1.0)
    moved = {
        name for name, p in student.named_parameters() if not torch.equal(p.detach(), before[name])
    }
    assert {name.rpartition(".")[2] for name in moved} == moving
    for name in moved - {n for n in moved if "norm" in n}:
        assert any(
            part in name for part in {"mlp": ("mlp",), "attention": ("attn",)}[kinds[0]]
        ) or (len(kinds) == 2)


@pytest.mark.recipe
@pytest.mark.parametrize("plan", ["q2a4", "q4_r4", "q2a4_int_g32"])
def test_training_lowers_the_loss(plan):
    """Twenty steps on one batch: the student comes nearer to its teacher."""
    student = tiny_student(plan=plan)
    trainer = make_trainer(student, ("weights", "scales"), lr=3e-3)
    repeated = batch()
    losses = [trainer.step([repeated], 1.0)[0].item() for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_step_uses_the_share_of_each_peak_rate():
    """Groups keep their peaks; the schedule gives a share of them."""
    student = tiny_student()
    trainer = make_trainer(student, ("weights", "scales"))
    trainer.optimizer.param_groups[1]["peak_lr"] = 0.5
    trainer.step([batch()], 0.25)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.25e-3, 0.125]
    assert trainer.peak_rate() == 0.5


def test_clipping_bounds_what_the_optimizer_gets():
    """The norm that is reported is the one before; 0 clips nothing."""
    seen = []

    class Recorder(torch.optim.SGD):
        def step(self):
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            seen.append(torch.stack([g.norm() for g in grads]).norm().item())

    norms = []
    for limit in (0.0, 1e-3):
        student = tiny_student()
        trainer = make_trainer(student, clip_grad_norm=limit)
        groups = [{**g, "peak_lr": 1.0} for g in trainer.optimizer.param_groups]
        trainer.optimizer = Recorder(
            [{"params": g["params"], "peak_lr": 1.0} for g in groups], lr=1.0
        )
        norms.append(trainer.step([batch()], 1.0)[1].item())
    assert norms[0] == pytest.approx(norms[1])
    assert seen[0] == pytest.approx(norms[0], rel=1e-4)
    assert seen[1] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.recipe
@pytest.mark.parametrize("part", ["row", "column"])
def test_a_dead_row_trains(part):
    """Pruned weights make low-rank scales of zero; the run used to end in NaN at its first step."""
    model = tiny_llama()
    for layer in model.model.layers:
        weight = layer.mlp.up_proj.weight
        weight[(3,) if part == "row" else (slice(None), 5)] = 0.0
    quantize_plainly(model, "q2_r2")
    trainer = make_trainer(model)
    for seed in range(3):
        loss, norm = trainer.step([batch(seed)], 1.0)
        assert torch.isfinite(loss)
        assert torch.isfinite(norm)


@pytest.mark.parametrize(
    ("family", "parts"),
    list(zip(TINY_MODELS, [PARTS, ("weights", "scales"), ("norms",)], strict=True)),
)
def test_steps_run_in_bfloat16(family, parts):
    """What trains is float32, norms too; the rest computes in 8 bits of precision."""
    student = tiny_student(family).to(torch.bfloat16)
    for layer in quantized_layers(student).values():
        layer.float()
    trainer = make_trainer(student, parts, lr=3e-3, dtype=torch.bfloat16)
    repeated = batch()
    losses = [trainer.step([repeated], 1.0)[0].item() for _ in range(5)]
    assert min(losses) < losses[0]
    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert all(p.dtype == torch.float32 for p in trained)


def test_the_hard_loss_is_added_with_its_weight():
    """Cross-entropy on the teacher's likeliest token next to the divergence."""
    student = tiny_student()
    trainer = make_trainer(student)
    token_ids, signal = parts_of(batch())
    with torch.no_grad():
        logits = student(token_ids).logits[:, :-1]
        best = signal.token_ids[..., 0]
        hard = -logits.log_softmax(-1).gather(-1, best.unsqueeze(-1)).squeeze(-1)
        soft = forward_kl(logits, signal)
    expected = (soft + 0.3 * hard)[signal.mask].mean()
    loss, _ = trainer.step([Batch.of(token_ids, signal)], 1.0, 0.3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_all_tokens_as_negatives_change_nothing():
    """R = V: the loss and every gradient of full logits."""
    student = tiny_student()
    trainer = make_trainer(student)
    token_ids, signal = parts_of(batch())
    results = []
    for asked in (signal, with_negatives(signal, draw_negatives(0, 0, VOCAB_SIZE, VOCAB_SIZE))):
        form_weights(trainer.layers, torch.float32)
        loss = trainer.accumulate([Batch.of(token_ids, asked)], 0.3)
        pull_gradients(trainer.layers)
        results.append((loss.item(), gradients(student)))
        student.zero_grad(set_to_none=True)
    (loss, expected), (found, candidates) = results
    assert found == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(candidates, expected, 1e-5)


def test_the_head_used_is_the_models_own():
    """Positions predict the next token: hidden states of the last one are left out."""
    model = tiny_llama()
    token_ids = batch().token_ids
    signal = dense_signal(model(token_ids).logits[:, :-1], torch.ones(4, 7, dtype=torch.bool))
    hidden = hidden_states(model, token_ids)[:, :-1]
    assert forward_kl(logits_of(model, hidden), signal).abs().max() < 1e-5


def test_a_step_holds_one_unpacked_teacher_at_a_time():
    """Dense logits of all micro-batches were formed before the first forward pass."""
    trainer = make_trainer(tiny_student())
    alive, most = weakref.WeakSet(), []

    def unpacking(made):
        def unpack():
            logits = tiny_llama()(made.token_ids).logits[:, :-1]
            signal = dense_signal(logits, made.mask)
            alive.add(signal.log_probs)
            most.append(len(alive))
            return signal

        return replace(made, unpack=unpack)

    trainer.step([unpacking(batch(seed)) for seed in range(4)], 1.0)
    assert most == [1] * 4


@pytest.mark.recipe
@pytest.mark.parametrize("num_batches", [1, 16])
def test_micro_batches_add_up_in_float32(num_batches):
    """A bfloat16 leaf lost most of what the later of many micro-batches add."""
    student = tiny_student().to(torch.bfloat16)
    for layer in quantized_layers(student).values():
        layer.float()
    trainer = make_trainer(student, ("weights",), dtype=torch.bfloat16)
    batches = [batch(seed, rows=1, ratio=1.1) for seed in range(num_batches)]
    expected = None
    for one in batches:  # a share of a power of two changes no digit
        trainer.form()
        trainer.accumulate([one], None)
        trainer.pull()
        found = gradients(student)
        expected = {n: g + expected[n] for n, g in found.items()} if expected else found
        student.zero_grad(set_to_none=True)
    trainer.form()
    trainer.accumulate(batches, None)
    trainer.pull()
    mean = {name: gradient / num_batches for name, gradient in expected.items()}
    assert_same_gradients(gradients(student), mean, 1e-5)
    assert not trainer.sums


def in_float16(**changes):
    """Return a trainer of a student in float16 whose loss is too small for it."""
    student = tiny_student().half()
    for layer in quantized_layers(student).values():
        layer.float()
    settings = {"scaler": loss_scaler(torch.device("cpu"), torch.float16), **changes}
    return make_trainer(
        student,
        ("weights", "scales"),
        dtype=torch.float16,
        divergence=lambda logits, signal: forward_kl(logits, signal) * 2**-16,
        **settings,
    )


def test_float16_gradients_do_not_vanish():
    """They lie below float16's smallest number: without a loss scale nothing trained."""
    small = make_trainer(
        tiny_student(),
        ("weights", "scales"),
        divergence=lambda logits, signal: forward_kl(logits, signal) * 2**-16,
    )
    loss, expected = small.step([batch()], 1.0)
    found_loss, found = in_float16().step([batch()], 1.0)
    assert found_loss.item() == pytest.approx(loss.item(), rel=0.02)
    assert found.item() == pytest.approx(expected.item(), rel=0.02)
    _loss, unscaled = in_float16(scaler=None).step([batch()], 1.0)
    assert abs(unscaled.item() - expected.item()) > 0.02 * expected.item()


@pytest.mark.recipe
def test_a_float16_step_that_overflows_is_left_out():
    """The scale halves until gradients fit; the loss is told as it is, the run does not end."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    trainer = in_float16(scaler=scaler)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    loss, norm = trainer.step([batch()], 1.0)
    assert torch.isfinite(loss)
    assert norm == 0
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    norms = [trainer.step([batch()], 1.0)[1].item() for _ in range(30)]
    assert 2.0**10 < scaler.get_scale() < 2.0**40
    assert norms[-1] > 0
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_a_gradient_that_no_scale_mends_is_told():
    """At a scale below one it is no overflow, and the run ends."""
    trainer = in_float16(scaler=torch.amp.GradScaler("cpu", init_scale=0.5))
    trainer.divergence = lambda logits, signal: (logits.float() * float("inf")).sum(-1)
    assert not torch.isfinite(trainer.step([batch()], 1.0)[1])


@pytest.mark.recipe
def test_dropout_works_in_steps_and_nowhere_else():
    """Modules are in training mode during the forward pass only, also if it fails."""
    student = tiny_student(attention_dropout=0.5).eval()
    trainer = make_trainer(student)
    seen = []
    layer = student.model.layers[0]
    layer.register_forward_pre_hook(lambda *_: seen.append(layer.self_attn.training))
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(trainer.accumulate([batch()], None).item())
    assert len(set(losses)) == 1, "outside a step nothing drops out"
    torch.manual_seed(0)
    first = trainer.step([batch()], 0.0)[0].item()
    torch.manual_seed(1)
    assert trainer.step([batch()], 0.0)[0].item() != first
    assert seen == [False] * 3 + [True] * 2
    trainer.divergence = None
    with pytest.raises(TypeError):
        trainer.step([batch()], 1.0)
    assert not any(module.training for module in student.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_alone_get_the_gradients_that_autograd_finds(dtype):
    """Without forming the scales again or looking indices up, whatever the compute dtype."""
    linear = torch.nn.Linear(24, 16, bias=False)
    spec = make_spec(bits=3, rank=3)
    layer = FakeQuantLinear.from_linear(linear, fit_weight(linear.weight, spec))
    layer.codebook.requires_grad_(False)
    gradient = torch.randn(16, 24).to(dtype)
    layer.fake_quantized_weight(dtype).backward(gradient)
    expected = gradients(layer)
    layer.zero_grad(set_to_none=True)
    with torch.no_grad():
        plain = layer.fake_quantized_weight(dtype)
    for _ in range(2):  # what is held serves every step
        form_weights([layer], dtype)
        assert torch.equal(layer.held_weight, plain)
        layer.held_weight.grad = gradient.clone()
        pull_gradients([layer])
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for name, found in gradients(layer).items():
        assert found.dtype == torch.float32
        gap = (found - expected[name]).norm() / expected[name].norm()
        assert gap < tolerance, name


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_unseen_tokens_stay(tied):
    """Embedding and head move in the rows that the data holds, and in no other."""
    student = tiny_student("llama", "q4a4, all=int4-g32", tied=tied)
    seen = torch.arange(VOCAB_SIZE) < 40
    kinds = ("embedding",) if tied else ("embedding", "head")
    trainer = make_trainer(student, ("weights", "scales"), kinds, seen=seen)
    layers = list(dict.fromkeys(token_layers(student)))
    layers = [layer for layer in layers if isinstance(layer, FakeQuantWeight)]
    before = [{n: p.detach().clone() for n, p in layer.named_parameters()} for layer in layers]
    token_ids = torch.randint(0, 40, (2, 12))
    signal = dense_signal(torch.randn(2, 11, VOCAB_SIZE), torch.ones(2, 11, dtype=torch.bool))
    trainer.step([Batch.of(token_ids, signal)], 1.0)
    for layer, old in zip(layers, before, strict=True):
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                moved = (parameter != old[name]).any(1)
                assert moved[:40].any() or name != "latent_weight"  # on the grid, scales wait
                assert not moved[40:].any(), name


def losses_of(parts, choice, num_steps, *, recomputes=False):
    """Return the losses of steps on a student of four layers, and what was compiled for them."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    student = tiny_student(num_hidden_layers=4)
    trainer = make_trainer(student, parts)
    if recomputes:
        enable_gradient_checkpointing(student)
    compile_decoder_layers(student, choice)
    losses = [
        float(trainer.step([batch(2 * n), batch(2 * n + 1)], 1.0)[0]) for n in range(num_steps)
    ]
    return losses, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.recipe
@pytest.mark.parametrize("recomputes", [False, True])
def test_compiled_layers_train_as_others_do(recomputes):
    """One program for the first layer, whose input needs no gradient, and one for all others.

    Differences of 1e-8 move a number to another cell or float16 sooner or later, so only the first
    steps are alike.
    """
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("no C++ compiler")
    expected, none = losses_of(("scales", "norms"), "auto", 8)
    found, count = losses_of(("scales", "norms"), "on", 8, recomputes=recomputes)
    assert none == 0
    assert 0 < count <= 2
    assert found == pytest.approx(expected, abs=1e-5, rel=0)
    expected, _ = losses_of(PARTS, "off", 4)
    found, _ = losses_of(PARTS, "on", 4, recomputes=recomputes)
    assert found == pytest.approx(expected, abs=1e-5, rel=0)


@pytest.mark.device
@pytest.mark.parametrize("choice", ["off", "on"])
def test_an_accelerator_trains_as_the_cpu_does(accelerator, choice):
    """The first losses in float32; rounding errors of sums move numbers later."""
    losses = {}
    for device in (torch.device("cpu"), accelerator.torch_device):
        student = tiny_student().to(device)
        trainer = make_trainer(student, sync=accelerator.sync)
        compile_decoder_layers(student, "off" if device.type == "cpu" else choice)
        parts = [replace(batch(n), token_ids=batch(n).token_ids.to(device)) for n in range(4)]
        for n, part in enumerate(parts):
            signal = batch(n).unpack().to(device)
            parts[n] = replace(part, mask=part.mask.to(device), unpack=lambda signal=signal: signal)
        losses[device.type] = [float(trainer.step([part], 1.0)[0]) for part in parts]
    expected = losses.pop("cpu")
    assert next(iter(losses.values())) == pytest.approx(expected, abs=1e-4, rel=0)


@pytest.mark.device
def test_float16_on_an_accelerator_loses_no_gradient(accelerator):
    """Scaled losses train about as far as float32 does."""
    ends = {}
    for dtype in (torch.float32, torch.float16):
        student = tiny_student().to(accelerator.torch_device)
        trainer = make_trainer(
            student,
            dtype=dtype,
            sync=accelerator.sync,
            scaler=loss_scaler(accelerator.torch_device, dtype),
        )
        part = batch(0)
        signal = part.unpack().to(accelerator.torch_device)
        part = replace(
            part,
            token_ids=part.token_ids.to(accelerator.torch_device),
            mask=part.mask.to(accelerator.torch_device),
            unpack=lambda signal=signal: signal,
        )
        for _ in range(30):
            loss, _ = trainer.step([part], 1.0)
        ends[dtype] = float(loss)
    assert ends[torch.float16] == pytest.approx(ends[torch.float32], rel=0.1)


IN_USE = [
    ("q2a4, embed=int4-g8", PARTS),
    ("linears=gguf:q4_1, embed=gguf:q4_0", PARTS),
    ("q4_r4", ("scales",)),  # with weights a rounding of a gradient's sum decides the next step
]


@pytest.mark.recipe
@pytest.mark.parametrize(("plan", "parts"), IN_USE)
def test_weights_formed_in_use_train_as_those_formed_once(plan, parts):
    """Two steps of two micro-batches; between them no decoder layer holds a weight."""
    found = {}
    for in_use in (False, True):
        student = quantize_plainly(tiny_llama(hidden_size=32, intermediate_size=64), plan)
        kinds = ("mlp", "attention", "embedding")
        trainer = make_trainer(student, parts, kinds, forms_in_use=in_use)
        enable_gradient_checkpointing(student)
        losses = []
        for step in range(2):
            loss, norm = trainer.step([batch(step), batch(step + 2)], 1.0)
            losses += [float(loss), float(norm)]
            held = [layer.held_weight for layer in quantized_layers(student.model.layers).values()]
            assert all((weight is None) == in_use for weight in held)
        found[in_use] = losses, {name: p.detach() for name, p in student.named_parameters()}
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    for name, values in found[True][1].items():
        torch.testing.assert_close(values, found[False][1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.recipe
def test_gradients_of_weights_formed_in_use_are_gone_layer_by_layer(monkeypatch):
    """When a layer's scales get theirs, no other layer has a formed weight or its gradient."""
    student = tiny_student(plan="q4a4", num_hidden_layers=4)
    trainer = make_trainer(student, ("scales",), forms_in_use=True)
    enable_gradient_checkpointing(student)
    alive, most = weakref.WeakSet(), []
    formed = FakeQuantWeight.fake_quantized_weight

    def form(layer, dtype=torch.float32):
        weight = formed(layer, dtype)
        alive.add(weight)
        most.append(len(alive))
        return weight

    monkeypatch.setattr(FakeQuantWeight, "fake_quantized_weight", form)
    trainer.step([batch()], 1.0)
    assert len(most) == 2 * 4 * 7  # forward, and again backward
    assert max(most) <= 7 + 1
