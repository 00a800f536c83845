"""What each browser has taught: a classifier of its own in memory, in bounded numbers, forgotten some time after its last use."""

from __future__ import annotations

import copy
import logging
import secrets
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amd_fast.classifier import Answer, FewShotClassifier
from amd_fast.errors import AmdFastError, DataError
from amd_fast.web.reading import Reading

logger = logging.getLogger(__name__)

UNKNOWN = "unknown"
NOTHING_TO_CHOOSE = "there is nothing to choose from yet; show clips of at least two actions first"
_LONGEST_NAME = 60


class FullError(AmdFastError):
    """No room for more: users, clips, or bytes."""


@dataclass(frozen=True)
class Limits:
    """Bounds of what the server holds and does.

    Attributes:
        upload_bytes: of one clip's file.
        uploads: received or read at a time.
        upload_seconds: that receiving one may take.
        read_seconds: that decoding one may take.
        sessions: browsers with clips.
        clips: enrolled by one browser.
        memory_bytes: that all browsers' clips may take, encoded.
        idle_seconds: after which a browser's clips are forgotten.
    """

    upload_bytes: int = 50_000_000
    uploads: int = 8
    upload_seconds: float = 120.0
    read_seconds: float = 30.0
    sessions: int = 100
    clips: int = 200
    memory_bytes: int = 1_000_000_000
    idle_seconds: float = 3600.0


@dataclass(frozen=True)
class EnrolledClip:
    """A clip that was shown: its number in the session, its action, what its file was called, and a JPEG picture."""

    number: int
    action: str
    name: str
    thumbnail: bytes


@dataclass
class Session:
    """One browser's classifier. Only one thread at a time may call :meth:`enrol`, :meth:`forget` and :meth:`ask`.

    Attributes:
        classifier: as it is before any clip, or with the clips of a gallery.
        clips: those enrolled here, oldest first.
        kept: folder that holds it as a gallery at all times; None where nothing is kept.
        used: when it was last used, seconds of the monotonic clock.
    """

    classifier: FewShotClassifier
    clips: list[EnrolledClip] = field(default_factory=list)
    kept: Path | None = None
    used: float = field(default_factory=time.monotonic)
    _next: int = 1

    def shots(self) -> dict[str, int]:
        """Number of clips of each action."""
        return dict(self.classifier.shots()) if hasattr(self.classifier, "classes_") else {}

    def memory(self) -> int:
        """Bytes that this session's own clips take, encoded, with their pictures."""
        if not self.clips:
            return 0
        gallery = self.classifier.gallery_
        per_clip = sum(value.numel() * value.element_size() for value in gallery.arrays.values()) / max(1, len(gallery))
        return round(per_clip * len(self.clips)) + sum(len(clip.thumbnail) for clip in self.clips)

    def enrol(self, reading: Reading, action: str, name: str) -> None:
        """Adds a clip as an example of an action.

        Raises:
            DataError: it is there already, under this action or another one.
        """
        updated = copy.copy(self.classifier)
        try:
            updated.partial_fit([reading.clip], [action])
        except DataError as error:  # its arrays are our own decoder's, so this is about what is enrolled already
            logger.debug("refused a clip: %s", error)
            raise DataError("this clip is an example of another action already; remove that action first, or give another clip") from error
        if updated.shots()[action] == self.shots().get(action, 0):
            raise DataError(f"this clip is an example of {action!r} already; give another one")
        self.classifier = updated
        self.clips.append(EnrolledClip(self._next, action, name[:_LONGEST_NAME], reading.thumbnail))
        self._next += 1
        self._keep()

    def forget(self, action: str) -> None:
        """Removes an action with its clips.

        Raises:
            DataError: there is no such action.
        """
        if action not in self.shots():
            raise DataError(f"there is no action {action!r} (any more)")
        if len(self.shots()) > 1:
            self.classifier = copy.copy(self.classifier).forget(action)
        else:
            self.classifier = FewShotClassifier(**self.classifier.get_params(deep=False))
        self.clips = [clip for clip in self.clips if clip.action != action]
        self._keep()

    def _keep(self) -> None:
        if self.kept is not None and self.shots():
            self.classifier.save(self.kept)
        elif self.kept is not None:
            shutil.rmtree(self.kept, ignore_errors=True)

    def questions(self) -> int:
        """Clips that tell how unlike the others a clip of an action may look: those of actions with two clips or more."""
        return len(self.classifier.calibration().familiarity) if len(self.shots()) > 1 else 0

    def ask(self, reading: Reading, false_unknown: float) -> Answer:
        """Recognises a clip.

        Args:
            reading: the clip.
            false_unknown: share (0 to 1) of clips of the actions that may be called unknown; as long as there are too few clips to
                keep to it, none is.

        Raises:
            DataError: fewer than two actions are enrolled.
        """
        if len(self.shots()) < 2:
            raise DataError(NOTHING_TO_CHOOSE)
        share = false_unknown if false_unknown * (1 + self.questions()) >= 1 else 0.0
        [answer] = copy.copy(self.classifier).set_params(false_unknown=share).explain([reading.clip])
        return answer

    def summary(self) -> dict[str, Any]:
        """The actions and their clips in plain values, oldest clip first; ``others`` counts clips of the gallery."""
        own: dict[str, list[EnrolledClip]] = {}
        for clip in self.clips:
            own.setdefault(clip.action, []).append(clip)
        actions = [
            {
                "name": action,
                "clips": [{"number": clip.number, "name": clip.name} for clip in own.get(action, [])],
                "others": shots - len(own.get(action, [])),
            }
            for action, shots in self.shots().items()
        ]
        return {"actions": actions, "questions": self.questions()}


class Sessions:
    """All sessions, by the random name in the browser's cookie. Safe to use from several threads.

    Args:
        classifier: what every session begins with; not changed.
        limits: how many there may be, for how long.
        keep: folder in which each session is kept as a gallery; None to keep nothing.
    """

    def __init__(self, classifier: FewShotClassifier, limits: Limits, keep: Path | None = None) -> None:
        self._first, self._limits, self._keep = classifier, limits, keep
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: str | None) -> Session:
        """The session of a browser; one without clips, which is not kept, where it has none."""
        with self._lock:
            self._forget_idle()
            found = self._sessions.get(key or "")
            if found is None:
                return Session(copy.copy(self._first))
            found.used = time.monotonic()
            return found

    def begin(self, key: str | None) -> tuple[str, Session]:
        """The name and the session of a browser, a new one where it has none.

        Raises:
            FullError: there are as many as there may be.
        """
        with self._lock:
            self._forget_idle()
            if key is None or key not in self._sessions:
                if len(self._sessions) >= self._limits.sessions:
                    raise FullError("as many people as this server has room for are using it; try again later")
                key = secrets.token_urlsafe(32)
                # Not the key: it opens the session.
                kept = None if self._keep is None else self._keep / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
                self._sessions[key] = Session(copy.copy(self._first), kept=kept)
            found = self._sessions[key]
            found.used = time.monotonic()
            return key, found

    def check_room(self, session: Session) -> None:
        """Makes sure that a session may have another clip.

        Raises:
            FullError: it may not.
        """
        if len(session.clips) >= self._limits.clips:
            raise FullError(f"{self._limits.clips} clips are as many as you can add; remove an action first")
        with self._lock:
            taken = sum(other.memory() for other in self._sessions.values())
        if taken >= self._limits.memory_bytes:
            raise FullError("this server's memory for clips is full; try again later")

    def forget_idle(self) -> None:
        """Forgets the sessions that have not been used for too long."""
        with self._lock:
            self._forget_idle()

    def _forget_idle(self) -> None:
        oldest = time.monotonic() - self._limits.idle_seconds
        self._sessions = {key: session for key, session in self._sessions.items() if session.used >= oldest}


def action_name(text: str) -> str:
    """A name for an action as it was typed, with single spaces.

    Raises:
        DataError: it is empty, too long, or taken by the answer for clips that are none of the actions.
    """
    name = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    if not name:
        raise DataError("give the action a name")
    if len(name) > _LONGEST_NAME:
        raise DataError(f"the name has {len(name)} characters; {_LONGEST_NAME} are the most")
    if name.casefold() == UNKNOWN:
        raise DataError(f"{UNKNOWN!r} is the answer for clips of no action; choose another name")
    return name
