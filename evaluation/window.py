"""A window to watch episodes in, where there is a screen."""

import numpy as np
import pygame

from utils import UserError


class Window:
    """A window of the size of what it shows; UserError where there is no screen for it."""

    def __init__(self) -> None:
        self.clock, self.paused = pygame.time.Clock(), False
        try:
            pygame.display.init()
            if pygame.display.get_driver() in ("dummy", "offscreen"):  # which SDL takes where it finds no screen
                raise pygame.error("there is no display")
        except pygame.error as error:
            raise UserError(f"--window: {error}; write a video instead: --video=episode.mp4") from error
        pygame.display.set_caption("Esc closes, space pauses")

    def show(self, picture: np.ndarray, fps: int) -> bool:
        """Show a picture (H, W, 3) for 1/fps seconds, or while paused; return False once somebody closed the window."""
        size, surface = picture.shape[1::-1], pygame.display.get_surface()
        if surface is None or surface.get_size() != size:
            surface = pygame.display.set_mode(size)
        pygame.surfarray.blit_array(surface, picture.swapaxes(0, 1))
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
