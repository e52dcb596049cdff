"""Says how a run ended, from the ledger lines of its videos."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from data_prep.output.ledger import Entry
from data_prep.video import video_to_records
from marlin_jax.records import cli, folders
from marlin_jax.records.cli import UserError, counted

# Most kinds of notes in a summary.
MAX_NOTES = 5


class TooManyFailedError(UserError):
  """Too many videos failed because of this machine."""


class NothingKeptError(UserError):
  """No video has a face track; the message lists the reasons.

  Args:
    entries: all ledger lines of a data set.
    output: folder of the data set.
  """

  def __init__(self, entries: Sequence[Entry], output: Path) -> None:
    super().__init__(
      "\n".join(
        [
          f"no face track in {counted(len(entries), 'video')}:",
          *cli.reasons({entry.video_id: entry.reason for entry in entries}),
          f"For all reasons see {output / folders.QUARANTINE}",
        ]
      )
    )


def check_failed(entries: Sequence[Entry], max_ratio: float) -> None:
  """Checks that few videos failed.

  Args:
    entries: ledger lines of the run.
    max_ratio: largest share of them that may have failed.

  Raises:
    TooManyFailedError: more have failed.
  """
  failed = _failures(entries)
  if len(failed) > max_ratio * len(entries):
    raise TooManyFailedError(
      "\n".join(
        [
          f"{len(failed)} of {counted(len(entries), 'video')} failed, which is "
          f"more than --max_failed_ratio={max_ratio:g}. The cause is this "
          "machine, not the videos:",
          *cli.reasons(failed),
          "The same command tries them again, and only them.",
        ]
      )
    )


def text(
  entries: Sequence[Entry], output: Path, num_frames: int, secs: float
) -> str:
  """Returns the counts of each split, failed and left-out videos, and notes.

  Args:
    entries: all ledger lines of a data set.
    output: folder of the data set.
    num_frames: number of frames that the run has decoded.
    secs: time that it took, in seconds.
  """
  statuses = Counter(entry.status for entry in entries)
  rate = f" ({num_frames / secs:.0f} frames/s)" if num_frames else ""
  lines = [f"Done in {secs:.0f} s{rate}. {output} holds:"]
  for split in sorted({entry.split for entry in entries}):
    kept = [e for e in entries if e.split == split and e.num_records]
    num_pictures = sum(e.num_decoded_frames == 1 for e in kept)
    counts = {
      "record": sum(e.num_records for e in kept),
      "face crop": sum(e.num_frames for e in kept),
      "face track": sum(e.num_tracks for e in kept),
      "video": len(kept) - num_pictures,
      "picture": num_pictures,
    }
    lines.append(
      f"  {split}: "
      + ", ".join(
        counted(number, noun) for noun, number in counts.items() if number
      )
    )
  if statuses[video_to_records.FAILED]:
    lines.append(
      f"  failed: {statuses[video_to_records.FAILED]}, because of this "
      "machine; the same command tries them again:"
    )
    lines += cli.reasons(_failures(entries))
  if statuses.keys() & {video_to_records.QUARANTINED, video_to_records.NO_FACE}:
    lines.append(
      f"  left out: {statuses[video_to_records.QUARANTINED]} quarantined, "
      f"{statuses[video_to_records.NO_FACE]} without a face; see "
      f"{output / folders.QUARANTINE}"
    )
  return "\n".join([*lines, *_noted(entries)])


def _failures(entries: Sequence[Entry]) -> dict[str, str]:
  """Returns the reason of each failed video."""
  return {e.video_id: e.reason for e in entries if e.is_failed}


def _noted(entries: Sequence[Entry]) -> list[str]:
  """Returns a line for each kind of note: the text before its colon."""
  videos_of = defaultdict(list)
  for entry in entries:
    for note in entry.notes:
      videos_of[note.partition(":")[0]].append((entry.video_id, note))
  lines = []
  for kind, noted in sorted(videos_of.items(), key=lambda item: -len(item[1])):
    video_id, note = noted[0]
    lines.append(
      f"  note: {kind}: {counted(len(noted), 'video')}, such as {video_id!a}"
      f"{note.removeprefix(kind)}"
    )
  if len(lines) > MAX_NOTES:
    others = f"  and {len(lines) - MAX_NOTES} other notes, see the ledger"
    lines[MAX_NOTES:] = [others]
  return lines
