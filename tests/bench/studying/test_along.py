"""What is measured along trainings at a constant learning rate."""

import copy

import torch
from torch.nn.functional import cross_entropy

from bench.studying.data import Sources
from bench.studying.task import task_of
from bench.studying.training import batches_of, initial_model, measured_along, models_along

CONFIG = {
    "data": "digits",
    "samples": 100,
    "labels": "clean",
    "model": "small MLP",
    "method": "SGD",
    "lr": 0.05,
    "momentum": 0.9,
    "batch_size": 20,
    "steps": 60,
    "seed": 0,
}


def test_models_are_those_of_a_training_at_a_constant_rate():
    task = task_of(CONFIG | {"evaluate": "test"}, Sources())
    model = initial_model(CONFIG, task)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    states = [copy.deepcopy(model.state_dict())]
    for batch in batches_of(CONFIG, task.train):
        optimizer.zero_grad()
        cross_entropy(model(batch.inputs), batch.labels).backward()
        optimizer.step()
    states.append(model.state_dict())
    found = [copy.deepcopy(each.state_dict()) for each in models_along(CONFIG, task, (0, 60))]
    torch.testing.assert_close(found, states)


def test_measurements_are_lists_by_name_and_their_draws_depend_on_the_seed():
    def measure(model, samples, generator):
        return {"seed": generator.initial_seed(), "samples": len(samples)}

    for seed in (3, 4):
        found = measured_along(CONFIG | {"seed": seed}, Sources(), (0, 10, 60), measure)
        assert found == {"seed": [seed] * 3, "samples": [100] * 3}
