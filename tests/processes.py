"""Real processes with a group of torch.distributed, which run functions of the tests."""

import datetime
import multiprocessing
import os
import pickle
import sys
import traceback

import torch
from torch import distributed

# Of collectives, in seconds: long enough for a machine that is busy. Tests of what hangs have a shorter one.
TIMEOUT = 60


class Processes:
    """Processes that wait for functions to run; those of a group have it for their functions.

    Args:
        size: how many.
        groups: the ranks of each group, besides that of all.
        timeout: of the collectives, in seconds.
        folder: where they find each other.
    """

    def __init__(self, size, groups, timeout, folder):
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = rank, size, [tuple(ranks) for ranks in groups], timeout, str(folder / "store"), theirs
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def outcomes(self, ranks, function, *args):
        """What function(group, rank in the group, *args) returns or raises in each process of a group.

        It is an EOFError for a process that has ended.
        """
        for rank in ranks:
            self._pipes[rank].send_bytes(pickle.dumps((tuple(ranks), function, args)))
        return [self._received(rank) for rank in ranks]

    def run(self, size, function, *args):
        """The results of `function` in the first processes."""
        found = self.outcomes(range(size), function, *args)
        for outcome in found:
            if isinstance(outcome, BaseException):
                raise outcome
        return found

    def _received(self, rank):
        try:
            if not self._pipes[rank].poll(2 * TIMEOUT):
                raise TimeoutError(f"the process of rank {rank} does not answer")
            return pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, ConnectionResetError) as error:
            return EOFError(error)

    def end(self):
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank, size, groups, timeout, store, pipe):
    """Run functions until the pipe is closed."""
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=timeout)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())  # warnings of torch.distributed
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(store, size), rank=rank, world_size=size, timeout=patience
    )
    members = {ranks: distributed.new_group(ranks, timeout=patience) for ranks in groups}
    members[tuple(range(size))] = distributed.group.WORLD
    while True:
        try:
            ranks, function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        try:
            torch.manual_seed(0)
            outcome = function(members[ranks], ranks.index(rank), *args)
        except Exception as error:
            error.add_note(traceback.format_exc())
            outcome = error
        pipe.send_bytes(pickle.dumps(outcome))
