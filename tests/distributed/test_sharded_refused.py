"""What cannot be right with a sharded model is an error, in all processes, which says what to do."""

import pytest
from sharding import with_differing_vectors, with_drifting_replica, with_step_left_out
from sharding_refused import captures_of_other_meshes, captures_of_parallel_models, refusals_of

PARALLEL = {"alone": r"placements \(Shard\(dim=0\),\)", "under fully_shard": "StridedShard"}
MESHES = {
    "part": r"^ValueError: .* processes \[(0, 1|2, 3)\], and process_group has the processes \[0, 1, 2, 3\]: pass a",
    "mesh of two dimensions": r"^ValueError: .* for a model that is sharded over all of it, the group of all",
}
NEEDS_WHOLE = r"^ValueError: .* are sharded, and verify and DiffusionMatrix need whole ones: call them before"
REFUSED = {
    "inside of a layer": r"^ValueError: module 'out_proj' of '1.self_attn' .* call fully_shard on '1.self_attn'",
    "without a group": r"^ValueError: .* are sharded .*process_group=torch.distributed.group.WORLD",
    "not verified": r"rgd_ext.verify\(model, x\) before fully_shard, or .*pass verify=False",
    "plan": r"^RuntimeError: .*call plan\(\) without arguments",
    "verify": NEEDS_WHOLE,
    "diffusion": NEEDS_WHOLE,
    "empty batch": r"^ValueError: .*at least one sample in each process",
    "hook": r"^ValueError: parameter '0.weight' has gradient hooks",
    "penalty": r"^RuntimeError: parameter '0.weight' .* outside the forward",
    "vector": r"^ValueError: vectors has 1 tensors",
    "sharded later": r"^RuntimeError: parameter '4.weight' is sharded, unlike at the capture",
    "sharded later, whole": r"^ValueError: .* are sharded .*call .remove\(\) on .*call fully_shard before the",
}


def assert_refused(found, expected):
    for errors in found:
        assert errors.keys() == expected.keys()
        for name, pattern in expected.items():
            with pytest.raises(ValueError, match=pattern):
                raise ValueError(errors[name])


def test_tensor_parallelism(processes):
    patterns = {name: f"^ValueError: parameter '0.weight' .*{kind}.*parallelism" for name, kind in PARALLEL.items()}
    assert_refused(processes.run(4, captures_of_parallel_models), patterns)


def test_meshes_of_other_processes(processes):
    assert_refused(processes.run(4, captures_of_other_meshes), MESHES)


def test_replicas_that_drift_apart(processes):
    for error in processes.run(4, with_drifting_replica):
        assert "the value of parameter '2.bias' of rank 2 differs from that of rank 0" in error


def test_a_step_that_one_process_leaves_out(processes):
    for error in processes.run(2, with_step_left_out):
        assert "the number of changes (steps of optimizers, loaded values) of parameter" in error
        assert "of rank 1 differs from that of rank 0" in error


def test_vectors_that_are_sharded_in_one_process_only(processes):
    for error in processes.run(2, with_differing_vectors):
        assert "(the statistics that a rule needs, the vectors of handle.align) of rank 1 differs" in error


def test_what_a_sharded_model_cannot_do(processes):
    assert_refused(processes.run(2, refusals_of), REFUSED)
