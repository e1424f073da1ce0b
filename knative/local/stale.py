"""What has changed on this machine of what a Service's newest revision was made of: its agent's code and its weights.

There is one version of the files here. So what runs goes on with what it has, and no other pod of its revision is started.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from knative.local.code import Code, listed
from knative.local.content import changed_files
from knative.local.manifest import Service
from knative.local.trouble import Trouble

if TYPE_CHECKING:
    from knative.local.revision import Revision
    from knative.local.rollout import Rollout


class Stale:
    """One Service's."""

    def __init__(self, rollout: Rollout, tell: Callable[[str], object]) -> None:
        self.files: list[str] = []  # that have changed, and were not taken
        self._rollout = rollout
        self._tell = tell
        self._is_renewing = False

    def notice(self, service: Service) -> bool:
        """Tell of what has changed, if anything; whether it is to be taken now, as no pod that works would have to go.

        service: the manifest as ever, with the code and the weights that there are now.
        """
        rollout, before = self._rollout, self.files
        newest, latest = rollout.newest, rollout.latest
        self.files = changed_files(newest.service, service)
        if not self.files:
            return False
        if rollout.next_failure or newest.failures.present or (newest.pods.kept and not latest.pods.ready):
            return True
        if latest.pods.kept and self.files != before:
            self._tell(
                f"{listed(self.files)} changed since {newest.name} was made, which goes on as it is; "
                "`relight run --reload` takes it at once, SIGHUP or the dashboard now, and so does the next pod that starts"
            )
        return False

    def is_outdated(self, revision: Revision) -> bool:
        """Whether a pod of the revision that starts now would run other code than its others. If so another revision is to take over."""
        if not self.is_gone(revision):
            return False
        if not self._is_renewing:
            self._is_renewing = True
            asyncio.get_running_loop().call_soon(self._renew, revision)
        return True

    def is_gone(self, revision: Revision) -> bool:
        """Whether the revision's code is not there any more."""
        code = revision.service.code
        return code is not None and code.is_gone()

    def after_failure(self, failed: Revision, latest: Revision) -> str:
        """What happens now that a revision has failed that was to take over from the latest one."""
        if not self.is_gone(latest):
            return f"{failed.name} failed; traffic stays on {latest.name}"
        files = _changed(latest)[1]
        if latest.pods.ready:
            return (
                f"{failed.name} failed; traffic stays on {latest.name}, of which one pod is kept until {files} is mended: "
                "with its code changed it could not be started again"
            )
        return (
            f"{failed.name} failed, and {latest.name} cannot start either, as its code is gone: callers get errors until {files} is mended"
        )

    def _renew(self, revision: Revision) -> None:
        """Have a revision with the code that there is now, as `revision` needs a pod and cannot have one."""
        self._is_renewing = False
        code, files = _changed(revision)
        rollout = self._rollout
        if revision in (rollout.latest, rollout.next):
            rollout.renew(replace(rollout.service, code=code), f"{files} changed since {revision.name} was made")
        elif not revision.pods.kept and not revision.failures.pause_s:
            reason = f"{revision.name} cannot start: {files} changed since, and there is one version of the files here"
            revision.failures.start_failed(Trouble(reason))


def _changed(revision: Revision) -> tuple[Code, str]:
    """The code that there is now, and the names of the files in which it is other code."""
    before = revision.service.code
    assert before
    now = before.now()
    return now, listed(before.changed(now))
