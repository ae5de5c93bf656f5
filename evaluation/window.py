"""A window to watch episodes in, where there is a screen."""

import os
import sys

import numpy as np

from utils import UserError


class Window:
    """A window of the size of what it shows; UserError where there is no screen for it."""

    def __init__(self) -> None:
        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise UserError("--window: there is no display; write a video instead: --video=episode.mp4")
        import pygame

        self.pygame, self.clock, self.paused = pygame, pygame.time.Clock(), False
        try:
            pygame.display.init()
            pygame.display.set_caption("Esc closes, space pauses")
            self.surface = pygame.display.set_mode((720, 720))
        except pygame.error as error:
            raise UserError(f"--window: cannot be opened: {error}") from error
        if "SDL_VIDEODRIVER" not in os.environ and pygame.display.get_driver() in ("dummy", "offscreen"):
            raise UserError("--window: there is no screen at DISPLAY or WAYLAND_DISPLAY")

    def show(self, picture: np.ndarray, fps: int) -> bool:
        """Show a picture (H, W, 3) for 1/fps seconds, or while paused; return False once somebody closed the window."""
        pygame, size = self.pygame, picture.shape[1::-1]
        if self.surface.get_size() != size:
            self.surface = pygame.display.set_mode(size)
        pygame.surfarray.blit_array(self.surface, picture.swapaxes(0, 1))
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
