"""Hueshift from Python: teach it a fox, draw with it, and take it home. Needs a server: `hueshift serve`.

python -P examples/client_python.py out/fox
"""

import os
import sys
from pathlib import Path

from hueshift.client.choices import Subject
from hueshift.client.connection import DEFAULT_ADDRESS
from hueshift.client.errors import HueshiftClientError
from hueshift.client.generation import Picture, Progress
from hueshift.client.jobs import FineTuneFailed, JobEvent, TrainingProgress
from hueshift.client.sync import Client

FOX = Path(__file__).resolve().parent / "pictures" / "fox" / "train"
STYLES = {"fluent-flat": "fluent flat", "fluent-modern": "fluent modern", "noto": "noto", "twemoji": "twemoji"}


def main(out: Path) -> None:
    """Run the tour. The address and the key come from the same variables as the command line's."""
    address = os.environ.get("HUESHIFT_ADDRESS", DEFAULT_ADDRESS)
    with Client(address, api_key=os.environ.get("HUESHIFT_API_KEY")) as client:
        client.wait_until_ready()

        # Four pictures; `sks` stands where the learned word belongs. Paths and bytes are both fine.
        job = client.fine_tune(
            [FOX / f"{name}.png" for name in STYLES],
            captions=[f"a {style} emoji of a sks animal" for style in STYLES.values()],
            subject=Subject.SUBJECT,
            adapter_id="fox",
        )
        # The job goes on whatever happens to this program; the watch picks up where it was after a lost connection.
        job = client.wait_for_job(job, on_event=tell)
        if job.scores is not None:
            print(f"CLIP-I with the pictures: {job.scores.clip_i:.2f}, the base model's: {job.scores.clip_i_base:.2f}")

        # A style the fox was never shown in, at full strength and at half.
        out.mkdir(parents=True, exist_ok=True)
        for weight in (1.0, 0.5):
            for drawn in client.generate(
                "a fluent 3d emoji of a sks animal", adapters={"fox": weight}, count=2, seeds=[0], guidance_scale=3.0
            ):
                if isinstance(drawn, Progress):
                    print(f"denoising {drawn.step} of {drawn.of}")
                elif isinstance(drawn, Picture):
                    (out / f"fox-{weight:g}-{drawn.seed}.png").write_bytes(drawn.data)

        # The adapter is one small file.
        exported = client.export_adapter("fox")
        (out / "fox.safetensors").write_bytes(exported.data)
        print(f"{len(exported.data)} bytes, revision {exported.adapter.revision}, pictures in {out}")


def tell(event: JobEvent) -> None:
    """Say how far training is. Other events: StateChanged, and TrainingSample with a picture."""
    if isinstance(event, TrainingProgress):
        print(f"step {event.step} of {event.steps}, loss {event.loss:.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]))
    except HueshiftClientError as failure:
        # `reason` is stable and safe to branch on; the message is for people.
        sys.exit(f"{failure.reason or failure.code.name}: {failure}")
    except FineTuneFailed as failure:
        # The job itself came to a bad end, which `failure.job.error` explains.
        sys.exit(str(failure))
