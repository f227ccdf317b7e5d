"""Everything public."""

import importlib
import inspect
import typing


def everything_public(modules):
    """(module, name, function, class or method) for everything public, by the names that users write.

    Args:
        modules: suffixes of module names, such as ".metrics"; "" is the package itself.
    """
    for part in modules:
        module = importlib.import_module(f"spectralmetrics{part}")
        own = [key for key, each in vars(module).items() if getattr(each, "__module__", "") == module.__name__]
        for key in getattr(module, "__all__", [key for key in own if not key.startswith("_")]):
            each = getattr(module, key)
            if not callable(each) or typing.get_origin(each):  # an alias of a type is callable, too
                continue
            yield module.__name__, key, each
            if inspect.isclass(each):
                # The class, and base classes in the package that have no further bases.
                plain = [base for base in each.__bases__ if base.__bases__ == (object,)]
                parts = [each, *(base for base in plain if base.__module__.startswith("spectralmetrics"))]
                for method, function in (pair for part in parts for pair in vars(part).items()):
                    if not method.startswith("_") and isinstance(function, (classmethod, staticmethod)):
                        yield module.__name__, f"{key}.{method}", function.__func__
                    elif not method.startswith("_") and inspect.isfunction(function):
                        yield module.__name__, f"{key}.{method}", function
