"""The Trainer of Hugging Face in one process: its steps are those by hand, and its logs have the statistics."""

import pytest
import torch
from oracle import assert_close, flat, per_sample_gradients, relative_error, weak_field
from torch.nn.functional import cross_entropy
from trainers import HEADS, Logits, transformer

import rgd_ext

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import transformers

from rgd_ext.integrations.transformers import RGDTrainer, StatsCallback  # needs transformers

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the Trainer
BATCH, SMOOTHING = 3, 0.1
POLICY = {"epsilon": rgd_ext.Rayleigh(0.3)}


def model_of(name):
    """A tiny model in float64."""
    return transformer(name).double()


def samples_of(name, count=2 * BATCH):
    """Samples of a model's task; some tokens of a language have no loss."""
    inputs = torch.randn(count, 1, 4, 4, dtype=torch.float64) if name == "vit" else torch.randint(16, (count, 6))
    labels = torch.randint(2, (count,))
    if name == "gpt2":
        labels = torch.where(torch.arange(6) < torch.randint(3, 7, (count, 1)), inputs, -100)
    key = "pixel_values" if name == "vit" else "input_ids"
    return [{key: x, "labels": y} for x, y in zip(inputs, labels, strict=True)]


def arguments_of(folder, **options):
    options = {"max_steps": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0} | options
    return transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH, lr_scheduler_type="constant", logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip


def trainer_of(folder, model, data, others=(), **options):
    """A Trainer whose steps are those of SGD with a learning rate of 1.

    Args:
        others: arguments of the Trainer in place of the usual ones.
        options: of the TrainingArguments.
    """
    sgd = torch.optim.SGD, {"lr": 1.0}
    others = {"precondition": POLICY, "optimizer_cls_and_kwargs": sgd} | dict(others)
    return RGDTrainer(model, arguments_of(folder, **options), train_dataset=data, **others)


def by_hand(name, model, data, fraction=0.3, smoothing=SMOOTHING):
    """The direction of all samples, from the loss that docs/distributed.md says."""
    inputs, labels = (torch.stack(column) for column in zip(*(sample.values() for sample in data), strict=True))

    def loss(logits):
        if name != "gpt2":
            return cross_entropy(logits, labels, label_smoothing=smoothing)
        scores, tokens = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total = cross_entropy(scores, tokens, label_smoothing=smoothing, reduction="sum")
        return total / (labels != -100).sum()

    return weak_field(per_sample_gradients(Logits(model), loss, [inputs]), "Rayleigh", fraction)


def step_of(trainer):
    """What the first step of a training takes from the parameters, at a learning rate of 1."""
    before = flat(trainer.model.parameters()).detach().clone()
    trainer.train()
    return before - flat(trainer.model.parameters()).detach()


def assert_close_to_trainer(value, expected):
    """Close but for the factor of the label smoothing, which the Trainer has in float32."""
    assert relative_error(value, expected) < 1e-9


@pytest.mark.parametrize("name", HEADS)
def test_a_step_with_accumulation_checkpointing_and_label_smoothing_is_that_of_one_batch(name, tmp_path):
    model, data = model_of(name), samples_of(name)
    expected = by_hand(name, model, data)
    trainer = trainer_of(
        tmp_path, model, data, label_smoothing_factor=SMOOTHING, activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    assert_close_to_trainer(step_of(trainer), expected)
    assert rgd_ext.handle_of(model).stats.batch_size == len(data)


def test_the_plain_trainer_warns_where_it_accumulates(tmp_path):
    model = model_of("bert")
    trainer = transformers.Trainer(model, arguments_of(tmp_path), train_dataset=samples_of("bert"))
    with rgd_ext.precondition(model), pytest.warns(UserWarning, match=r"sum of 2 directions.*use RGDTrainer"):
        trainer.train()


def test_the_statistics_of_each_step_are_logged_beside_its_loss(tmp_path):
    model = model_of("bert")
    trainer = trainer_of(tmp_path, model, samples_of("bert", 8 * BATCH), max_steps=3)
    seen = []
    trainer.add_callback(StatsCallback(trainer))
    trainer.add_callback(Noting(lambda: seen.append(rgd_ext.handle_of(model).stats)))
    trainer.train()
    losses, rows = ([row for row in trainer.state.log_history if name in row] for name in ("loss", "rgd/trace"))
    assert [row["step"] for row in rows] == [row["step"] for row in losses] == [1, 2, 3]
    for row, stats in zip(rows, seen, strict=True):
        assert row["rgd/batch_size"] == 2 * BATCH
        for name in ("epsilon", "trace", "rayleigh", "cosine", "effective_sample_size", "grad_norm", "direction_norm"):
            assert row[f"rgd/{name}"] == getattr(stats, name).item()
    assert "rgd/lambda_max" not in rows[0]  # which `Rayleigh` does without


class Noting(transformers.TrainerCallback):
    """Calls a function after each step."""

    def __init__(self, action):
        self.action = action

    def on_step_end(self, *args, **kwargs):
        self.action()


class Stopping(transformers.TrainerCallback):
    """Stops a training after the first micro-batch."""

    def on_substep_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_a_training_that_stopped_within_a_step_leaves_nothing_to_the_next(tmp_path):
    model, data = model_of("bert"), samples_of("bert")
    trainer = trainer_of(tmp_path, model, data)
    trainer.add_callback(Stopping)
    assert not step_of(trainer).count_nonzero()
    trainer.remove_callback(Stopping)
    step_of(trainer)
    assert rgd_ext.handle_of(model).stats.batch_size == len(data)


def test_after_the_training_backwards_write_by_themselves(tmp_path):
    model, data = model_of("bert"), samples_of("bert")
    trainer_of(tmp_path, model, data).train()
    model.zero_grad()
    model(torch.stack([sample["input_ids"] for sample in data[:2]])).logits.sum().backward()
    assert rgd_ext.handle_of(model).stats.batch_size == 2
    assert model.classifier.weight.grad is not None


@pytest.mark.parametrize(
    "options", [rgd_ext.Rayleigh(0.3), {"eps": 0.3}, {"process_group": None}], ids=["policy", "unknown", "group"]
)
def test_options_that_the_capture_has_not_are_refused_at_once(options, tmp_path):
    with pytest.raises(TypeError, match=r"precondition is .*: pass a dict with options of batch_dim, .*epsilon"):
        trainer_of(tmp_path, model_of("bert"), samples_of("bert"), others={"precondition": options})


def test_a_model_that_the_user_has_captured_is_refused(tmp_path):
    model, data = model_of("bert"), samples_of("bert")
    handle = rgd_ext.precondition(model)
    trainer = trainer_of(tmp_path, model, data)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification is captured already.*\.remove\(\)"):
        trainer.train()
    handle.remove()  # the remedy
    assert step_of(trainer).count_nonzero()


def test_a_second_trainer_takes_the_capture_over_with_its_own_options(tmp_path):
    model, data = model_of("bert"), samples_of("bert")
    trainer_of(tmp_path, model, data).train()
    second = trainer_of(tmp_path, model, data, others={"precondition": {"epsilon": 0.0}})
    step_of(second)
    assert rgd_ext.handle_of(model).stats.epsilon == 0


def test_trainers_of_one_model_take_turns(tmp_path):
    model, data, fractions = model_of("bert"), samples_of("bert", BATCH), (0.3, 0.1)
    options = ({"precondition": {"epsilon": rgd_ext.Rayleigh(fraction)}} for fraction in fractions)
    trainers = [trainer_of(tmp_path, model, data, others, gradient_accumulation_steps=1) for others in options]
    for turn in (0, 1, 0, 1):
        expected = by_hand("bert", model, data, fractions[turn], smoothing=0.0)
        assert_close(step_of(trainers[turn]), expected)
    with pytest.raises(RuntimeError, match="captured anew since, by a newer optimizer"):
        trainers[0].optimizer.step()


def test_the_plain_direction_is_that_of_the_trainer_itself(tmp_path):
    data, model = samples_of("bert"), model_of("bert")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = step_of(trainer_of(tmp_path, model, data, others={"precondition": {"epsilon": 0.0}}))
    rgd_ext.handle_of(model).remove()
    model.load_state_dict(state)
    sgd = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0})}
    plain = transformers.Trainer(model, arguments_of(tmp_path), train_dataset=data, **sgd)
    assert_close(found, step_of(plain))


def test_other_trainers_become_its_subclasses(tmp_path):
    class Both(RGDTrainer, transformers.Seq2SeqTrainer):
        pass

    model, data = model_of("bert"), samples_of("bert")
    options = arguments_of(tmp_path, label_smoothing_factor=SMOOTHING).to_dict()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    expected = by_hand("bert", model, data)
    arguments = transformers.Seq2SeqTrainingArguments(**options)
    trainer = Both(model, arguments, train_dataset=data, precondition=POLICY, optimizers=(sgd, None))
    assert_close_to_trainer(step_of(trainer), expected)


def test_an_optimizer_that_has_captured_the_model_is_refused(tmp_path):
    model = model_of("bert")
    others = {"optimizer_cls_and_kwargs": None, "optimizers": (rgd_ext.RGD(model, lr=1.0), None)}
    trainer = trainer_of(tmp_path, model, samples_of("bert"), others=others)
    with pytest.raises(ValueError, match="type RGD, which captures a model itself"):
        trainer.train()


@pytest.mark.parametrize("flag", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_sharding_by_the_trainer_is_refused(flag, tmp_path):
    trainer = trainer_of(tmp_path, model_of("bert"), samples_of("bert"))
    setattr(trainer, flag, True)
    with pytest.raises(ValueError, match="deepspeed or fsdp"):
        trainer.create_optimizer()


def test_statistics_of_a_model_that_is_not_captured_are_refused(tmp_path):
    model = model_of("bert")
    trainer = transformers.Trainer(model, arguments_of(tmp_path), train_dataset=samples_of("bert"))
    trainer.add_callback(StatsCallback(trainer))
    with pytest.raises(ValueError, match="the BertForSequenceClassification of this Trainer is not captured"):
        trainer.train()
    with rgd_ext.observe(model):  # the remedy
        trainer.train()
    assert [row["rgd/batch_size"] for row in trainer.state.log_history if "rgd/batch_size" in row] == [BATCH]


def test_the_callback_needs_its_trainer():
    with pytest.raises(TypeError, match="trainer is None: pass the Trainer"):
        StatsCallback(None)
