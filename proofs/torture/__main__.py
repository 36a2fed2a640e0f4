"""`make torture`: a running paygate, its clients and everything that breaks around them; then the verdict."""

import argparse
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from proofs.torture import verdict
from proofs.torture.faults import LOG_OF_FAULTS, Faults
from proofs.torture.overload import Overload
from proofs.torture.people import Findings, People
from proofs.torture.stage import Stage, temporary_folder
from proofs.torture.strangers import Strangers

WARM_UP_SECONDS = 5


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m proofs.torture", description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000, help="of everything that is drawn")
    parser.add_argument("--minutes", type=float, default=5, help="how long things break (5)")
    parser.add_argument(
        "--faults",
        default="",
        metavar="WORDS",
        help="only faults (or kinds of overload) with one of these in their names",
    )
    parser.add_argument("--shoppers", type=int, default=8, help="clients at once (8)")
    parser.add_argument(
        "--brisk", action="store_true", help="shorter faults, one after the other; a tenth of the strangers"
    )
    parser.add_argument("--overload", action="store_true", help="more than the service can take, and nothing broken")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="keep logs and ledger here")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("interrupted: nothing was judged", flush=True)
        return 130


def run(options: argparse.Namespace) -> int:
    print(f"python -m proofs.torture --seed {options.seed} --minutes {options.minutes:g}", flush=True)
    with ExitStack() as stack:
        if options.keep is None:
            folder = stack.enter_context(temporary_folder())
        else:
            folder = options.keep.absolute()
            folder.mkdir(parents=True)
            folder.chmod(0o711)
        findings = Findings()
        if options.overload:
            return overload(folder, stack, findings, options)
        stage = Stage(folder, stack)
        people = People(stage, findings, options.seed)
        faults = Faults(stage, findings, options.seed, only=options.faults, brisk=options.brisk)
        people.start(options.shoppers, operators=2)
        time.sleep(WARM_UP_SECONDS)
        before = verdict.usage(stage)
        faults.start()
        time.sleep(options.minutes * 60)
        faults.stop()
        people.stop()
        faults.mend_all()
        rest_seconds = verdict.come_to_rest(stage, people, findings)
        verdict.judge(stage, people, findings)
        after = verdict.usage(stage)
        for line in verdict.leaks(before, after):
            findings.add("wrong", f"more in use than before: {line}")
        report(stage, people, faults, findings, rest_seconds)
        print(f"  in use before  {before}\n  in use after   {after}")
        print(f"  faults         {folder / LOG_OF_FAULTS}" if options.keep else "")
    return 1 if any(findings.found.values()) else 0


def overload(folder: Path, stack: ExitStack, findings: Findings, options: argparse.Namespace) -> int:
    """With the settings of production: the time-outs and the number of threads are what is measured."""
    env = {"PAYSTACK_TIMEOUT": "10", "LEASE_SECONDS": "60", "PAYMENT_TTL_HOURS": "24", "DB_POOL": "8"}
    stage = Stage(folder, stack, threads=64, WORKER_INTERVAL="2", **env)
    words = options.faults.split(",")
    first = Overload(stage, findings, options.seed)
    share = 0.1 if options.brisk else 1
    for kind in (Strangers(stage, findings, stack, first.hook, share), first):
        kind.run(lambda name: any(word in name for word in words))
    for process in stage.instances:
        for line in verdict.unexpected_lines(process.log):
            findings.add("wrong", f"log of {process.folder.name}: {line}")
    for what in findings.found["wrong"][:40]:
        print(f"wrong: {what}")
    print(f"{len(findings.found['wrong'])} wrong")
    return 1 if findings.found["wrong"] else 0


def report(stage: Stage, people: People, faults: Faults, findings: Findings, rest_seconds: float) -> None:
    print("\nfault                              times  longest until ready")
    for name, count in sorted(faults.injected.items()):
        print(f"  {name:32} {count:6}  {faults.recovery_seconds[name]:6.1f} s")
    print(f"  {'of the provider, small':32} {sum(stage.met.values()):6}")
    for line in faults.left_out:
        print(f"  left out: {line}")
    print("\nanswered                           times  slowest")
    for name, count in sorted(findings.counts.items()):
        print(f"  {name:32} {count:6}  {findings.slowest[name]:6.1f} s")
    acknowledged = sum(sale.id is not None for sale in people.sales)
    total = sum(faults.injected.values()) + sum(stage.met.values())
    print(
        f"\n{total:,} faults, {len(people.sales):,} payments, {acknowledged:,} acknowledged; "
        f"at rest after {rest_seconds:.0f} s"
    )
    for kind in Findings.KINDS:
        print(f"  {kind:10} {len(findings.found[kind]):6}")
    for kind in Findings.KINDS:
        for what in findings.found[kind][:25]:
            print(f"{kind}: {what}")
    print(f"machine: {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
