"""cotrain: teach a small sequential recommender what a large language model knows, live."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cotrain.student.recommender import Recommender

__all__ = ["Recommender"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: `import cotrain` alone takes no second, and no torch.
    if name == "Recommender":
        from cotrain.student.recommender import Recommender

        return Recommender
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
