"""Listening: uvicorn, whose application refuses what is new as soon as it is told to stop, and finishes the rest."""

from types import FrameType

import uvicorn
from fastapi import FastAPI


class Server(uvicorn.Server):
    """uvicorn's, for ``create_app``'s application."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more requests, and stop once those taken are answered; a second interrupt stops at once."""
        app: FastAPI = self.config.app  # type: ignore[assignment]
        app.state.service.batcher.accepting = False
        super().handle_exit(sig, frame)


def run(app: FastAPI, *, host: str, port: int, grace: int) -> None:
    """Answer requests until told to stop, and ``grace`` seconds at most after that. Addresses are not logged."""
    Server(uvicorn.Config(app, host=host, port=port, access_log=False, timeout_graceful_shutdown=grace)).run()
