"""Nothing lost, nothing executed, nothing silent: what is done, how often, what must come out.

    python tests/robust.py                                # the short form, which the tests run
    python tests/robust.py --long > assets/robust.md      # the counts of the results page

ROWS is the table. An attack is a function of a number i that asserts what must come out; a row
calls it for i = 0, 1, ... They stand in attacks_lines.py, attacks_runs.py and attacks_files.py.
"""
import os
import sys
import tempfile
from collections import Counter

import torch
from attacks_files import (compressed, crafted_config, crafted_shape, cut_short, figure_damaged,
                           flip, log_damaged, missing_part, no_checkpoint, untouched)
from attacks_lines import (half_of_torchrun, hostile, hostile_process, odd_environment,
                           while_importing)
from attacks_runs import (base_changes, batch_maker_killed, diverged, elsewhere, explode,
                          full_at_checkpoint, full_at_log, kill, not_a_number, once_more,
                          one_question, stop, taken, too_little_memory, twice, two_at_once)
from forks import LONG, ROOT, SFT, module, run

# What is done, by what, how often in the tests and with --long; what must come out.
ROWS = [
    ("a hostile command line of one of the three scripts", hostile, 200, 2000,
     "one line, exit code 2, nothing written, within 2 s"),
    ("such a line in a process of its own", hostile_process, 1, 30, "the same"),
    ("kill -9 at a random moment (sft, grpo, meta), then --resume", kill, 9, 30,
     "weights, optimisers and log of a run never stopped, bit for bit"),
    ("the same seed again", once_more, 1, 1, "the same bits"),
    ("SIGINT, SIGTERM; SIGTERM to meta.py", stop, 3, 3, "saved, exit codes 130, 143"),
    ("a full disk at the second checkpoint", full_at_checkpoint, 1, 1,
     "one line, the first stands, and --resume comes to the same bits"),
    ("a full disk at the config, at the log", full_at_log, 2, 2, "one line"),
    ("a loss that explodes", explode, 1, 1, "one line with the step, a good checkpoint"),
    ("too little memory", too_little_memory, 1, 1, "one line that names --batch and --chunks"),
    ("a checkpoint cut short, at every sixteenth", cut_short, 16, 16, "refused"),
    ("a checkpoint with one bit flipped", flip, 60, 200, "refused, or nothing has changed"),
    ("payload, list, other version, other encoding, empty, text, raw pickle, folder, nothing",
     no_checkpoint, 9, 9, "refused, nothing executed"),
    ("--resume from half a checkpoint, a second run into a folder, a file in a folder's place",
     untouched, 3, 3, "refused, nothing touched"),
    ("two of meta.py into one folder at once", two_at_once, 1, 1, "one refused, one unharmed"),
    ("train --overwrite, --resume, analyze where a run is at work", taken, 1, 1,
     "refused, refused, a look; the run goes on"),
    ("GRPO over its own base; --resume after the base was replaced", base_changes, 2, 2,
     "refused, nothing touched"),
    ("meta.py --resume from another folder", elsewhere, 1, 1, "goes on, trains nothing else"),
    ("meta.py with one question", one_question, 1, 1, "a condition less"),
    ("a log too short, with a bad line, with a gap; --resume", log_damaged, 3, 3,
     "refused, nothing touched"),
    ("a weight that is NaN behind a finite loss", not_a_number, 1, 1,
     "not saved; the checkpoint before it is good"),
    ("that run, resumed with a larger rate, with smaller ones", diverged, 1, 1,
     "refused; goes on"),
    ("Ctrl-C while a script is imported", while_importing, 1, 9, "over, no traceback"),
    ("Ctrl-C twice in a step that does not end", twice, 1, 1, "over within a second"),
    ("the process that makes batches is killed", batch_maker_killed, 1, 1,
     "one line that names --resume"),
    ("WORLD_SIZE alone, RANK alone", half_of_torchrun, 2, 2, "refused, nothing written"),
    ("python -OO, strange letters, no compiler, ~, a closed pipe", odd_environment, 5, 5,
     "as usual"),
    ("a checkpoint of a shape that is not its weights'", crafted_shape, 10, 10,
     "refused within 3 s"),
    ("a checkpoint without a part", missing_part, 5, 5, "refused, and the line says which"),
    ("a checkpoint with compressed records", compressed, 1, 1, "refused"),
    ("a stored config with a field of another type or out of range", crafted_config, 12, 120,
     "refused, and the line says which"),
    ("a damaged figure's JSON", figure_damaged, 1, 1, "left out of the report, which says so")]

def summed_up(results):
    """Times -> the longest; words -> how often each."""
    results = [result for result in results if result is not None]
    if results and isinstance(results[0], float):
        return f" (the slowest after {max(results):.2f} s)"
    words = [f"{n} {word}" for word, n in Counter(results).items()]
    return f" ({', '.join(words)})" if words else ""

def attempts(attack, times):
    """-> what the attacks returned, and [how they were lost]"""
    results, lost = [], []
    for i in range(times):
        try:
            results.append(attack(i))
        except Exception as e:
            lost.append(f"{attack.__name__}({i}): {e!r}")
    return results, lost

def main():
    sys.path.insert(0, str(ROOT))
    # Once, before the forks; the last is what an optimiser imports when it is made.
    for name in ("train", "meta", "analyze", "experiments", "torch._dynamo"):
        module(name)
    torch.set_num_threads(1)
    lost = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        assert run("train", ["--out=base", "--steps=2", *SFT]).code == 0
        print("| what is done | how often | what came out |\n|---|---|---|")
        for what, attack, short, long, must in ROWS:
            times = long if LONG else short
            results, failures = attempts(attack, times)
            came_out = f"LOST: {len(failures)}" if failures else must + summed_up(results)
            print(f"| {what} | {times} | {came_out} |", flush=True)
            lost += failures
        os.chdir(ROOT)
    revision = module("lab.run").revision()
    lost = ["LOST:", *lost] if lost else [f"lost: nothing (revision {revision})"]
    print("\n" + "\n".join(lost))
    return 1 if len(lost) > 1 else 0

if __name__ == "__main__":
    raise SystemExit(main())
