from without_ray import no_ray

__all__ = ["no_ray"]
