"""A window to watch episodes in, where there is a screen."""

import os
import sys

from PIL.Image import Image

from utils import UserError


def open_window(width: int, required: bool) -> "Window | None":
    """Return a window; where none can be opened, None or, if it is required, a UserError."""
    try:
        return Window(width)
    except UserError:
        if required:
            raise
        return None


class Window:
    """A window of the size of what it shows first; UserError where there is no screen for it."""

    def __init__(self, width: int) -> None:
        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise UserError("--window: there is no display; write a video instead: --video=episode.mp4")
        import pygame

        self.pygame, self.clock, self.paused = pygame, pygame.time.Clock(), False
        try:
            pygame.display.init()
            pygame.display.set_caption("Esc closes, space pauses")
            self.surface = pygame.display.set_mode((width, width))
        except pygame.error as error:
            raise UserError(f"--window: cannot be opened: {error}") from error
        if "SDL_VIDEODRIVER" not in os.environ and pygame.display.get_driver() in ("dummy", "offscreen"):
            raise UserError("--window: there is no screen at DISPLAY or WAYLAND_DISPLAY")

    def show(self, picture: Image, fps: int) -> bool:
        """Show a picture for 1/fps seconds, or while paused; return False once somebody closed the window."""
        pygame = self.pygame
        if self.surface.get_size() != picture.size:
            self.surface = pygame.display.set_mode(picture.size)
        self.surface.blit(pygame.image.frombytes(picture.tobytes(), picture.size, "RGB"), (0, 0))
        while True:
            pygame.display.flip()
            self.clock.tick(fps)
            for event in pygame.event.get():
                pressed = event.key if event.type == pygame.KEYDOWN else None
                if event.type == pygame.QUIT or pressed == pygame.K_ESCAPE:
                    pygame.display.quit()
                    return False
                self.paused ^= pressed == pygame.K_SPACE
            if not self.paused:
                return True
