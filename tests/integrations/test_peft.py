"""PEFT: adapters are trained along the exact direction of their parameters, and nothing else is trained."""

import pytest
import torch
from oracle import assert_close, flat, flat_grad, per_sample_gradients, weak_field
from torch.nn.functional import cross_entropy
from trainers import Logits, transformer

import rgd_ext

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers

pytestmark = pytest.mark.filterwarnings("ignore")  # peft reads attributes that transformers deprecates
LAYERS = {
    "gpt2": {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True},
    "bert": {"target_modules": ["query", "value"], "bias": "lora_only", "modules_to_save": ["classifier"]},
}


def adapted(name, **options):
    """A tiny model with adapters, in float64, as a function of tokens."""
    # Not initialised as for a training, where half of the gradients are zero.
    adapters = peft.LoraConfig(r=2, init_lora_weights=False, **LAYERS[name], **options)
    return Logits(peft.get_peft_model(transformer(name), adapters).double())


def loss_of(logits):
    return logits.sin().square().mean()


def assert_exact(model, tokens):
    """The direction of what is trained is that of explicit gradients."""
    expected = weak_field(per_sample_gradients(model, loss_of, [tokens]))
    with rgd_ext.precondition(model):
        loss_of(model(tokens)).backward()
    assert_close(flat_grad(model), expected)


@pytest.fixture
def tokens():
    return torch.randint(16, (5, 6))


@pytest.mark.parametrize("name", LAYERS)
def test_the_direction_of_adapters_is_that_of_explicit_gradients(name, tokens):
    assert_exact(adapted(name), tokens)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_in_front_of_adapters_is_verified(name, tokens):
    report = rgd_ext.verify(adapted(name, lora_dropout=0.2).train(), tokens)
    assert report.parameters > 3
    assert not report.note


def test_dora_is_captured_as_a_unit(tokens):
    model = adapted("bert", use_dora=True)
    with pytest.raises((ValueError, RuntimeError), match=r"rgd_ext\.unit"):
        rgd_ext.verify(model, tokens)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            rgd_ext.register_rule(module, rgd_ext.unit)
    assert_exact(model, tokens)


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_frozen_keeps_its_bits_and_has_no_gradient(name, tokens):
    model = adapted(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = rgd_ext.RGD(model, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model(tokens)).backward()
        optimizer.step()
    assert {key for key, parameter in model.named_parameters() if parameter.grad is not None} == trained
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == trained


def test_adapters_are_trained_by_the_trainer(tmp_path, tokens):
    pytest.importorskip("accelerate")
    from rgd_ext.integrations.transformers import RGDTrainer

    module = adapted("bert")
    labels = torch.randint(2, (5,))
    expected = weak_field(per_sample_gradients(module, lambda y: cross_entropy(y, labels), [tokens]))
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=5, max_grad_norm=0, save_strategy="no", report_to=[],
        lr_scheduler_type="constant", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    data = [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]
    sgd = torch.optim.SGD, {"lr": 1.0}
    before = flat(p for p in module.parameters() if p.requires_grad).detach().clone()
    RGDTrainer(module.model, arguments, train_dataset=data, optimizer_cls_and_kwargs=sgd).train()
    assert_close(before - flat(p for p in module.parameters() if p.requires_grad).detach(), expected)
