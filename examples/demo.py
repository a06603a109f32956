"""The whole way: teach a style and a fox, swap them in, draw one batch that mixes both with the base model, and judge.

Run it with `make demo`, or `python -P examples/demo.py --out out/demo`. Everything goes through the public RPCs of a
server that this program starts and stops. Exits with 1 if something fails or a target is missed.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from hueshift.client.errors import HueshiftClientError
from hueshift.client.jobs import FineTuneFailed
from hueshift.examples.bars import Bars
from hueshift.examples.judging import Verdict, judge
from hueshift.examples.lessons import style_lesson, subject_lesson
from hueshift.examples.live_server import ServerFailed, live_server
from hueshift.examples.personalise import open_tenants
from hueshift.examples.report import print_summary, write_report


async def run_demo(out: Path, bars: Bars, settings: Mapping[str, float]) -> Verdict:
    """Do everything and write grid.png, report.html and report.json to `out`.

    `settings` are numbers of both fine-tuning jobs, over the method's defaults. Raises ServerFailed, and
    HueshiftClientError or FineTuneFailed, possibly in an ExceptionGroup.
    """
    begin = time.monotonic()
    lessons = [
        replace(lesson, settings={**lesson.settings, **settings}) for lesson in (style_lesson(), subject_lesson())
    ]
    async with AsyncExitStack() as stack:
        with bars.stage("Start a server and prepare the model"):
            names = tuple(lesson.tenant for lesson in lessons)
            server = await stack.enter_async_context(live_server(names, out / "cache", out / "server.log"))
            tenants = await stack.enter_async_context(open_tenants(server, bars))
        before = await tenants.draw_base()
        jobs = await tenants.teach(lessons)
        drawn = await tenants.draw_mixed(lessons)
        after = await tenants.draw_base()
        swap_seconds = await tenants.swap_seconds()
        with bars.stage("Stop the server"):
            await stack.aclose()
    with bars.stage("Judge the pictures"):
        verdict = Verdict(
            outcomes=judge(lessons, jobs, drawn),
            base_unchanged=before == after,
            generate_seconds=drawn.seconds,
            swap_seconds=swap_seconds,
            images=len(drawn.pictures),
            total_seconds=time.monotonic() - begin,
            engine=drawn.pictures[0].engine,
            plans=tuple(sorted({plan for picture in drawn.pictures for plan in picture.plans})),
        )
        write_report(out, verdict)
    return verdict


def main() -> int:
    """Run the demo and return the exit code."""
    parser = argparse.ArgumentParser(description="Teach a style and a fox to one model, and draw with both at once.")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the report")
    parser.add_argument(
        "--steps", type=int, help="training steps per adapter, for a quick look; too few miss the targets"
    )
    options = parser.parse_args()
    out: Path = options.out
    settings = {} if options.steps is None else {"steps": options.steps}
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, highlight=False)
    verdict: Verdict | None = None
    code = 1
    try:
        with Bars(console) as bars:
            verdict = asyncio.run(run_demo(out, bars, settings))
    except* (HueshiftClientError, FineTuneFailed, ServerFailed) as group:
        for error in group.exceptions:
            console.print(f"[bold red]The demo failed:[/bold red] {error}")
        console.print(f"What the server said is in {out / 'server.log'}.")
    except* (KeyboardInterrupt, asyncio.CancelledError):
        code = 130
    if verdict is None:
        return code
    print_summary(console, out, verdict)
    return 0 if verdict.passed else 1


if __name__ == "__main__":
    sys.exit(main())
