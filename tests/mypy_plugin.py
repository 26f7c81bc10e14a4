"""What mypy must be told about this package: methods added with fastcore's `@patch`, and what a torch module holds.

- A class built over several cells of a notebook gets its later methods by `@patch`. They are read as if they stood in
  the class, so that a name that does not exist is found.
- `nn.Module.__getattr__` promises `Tensor | Module` for every submodule and buffer. Which of them it is, torch cannot
  say; here it is neither checked nor an error, as with every other untyped name.
- `sum(losses)` is a tensor: the 0 that Python's `sum` begins with is the result of an empty one only.
"""

from mypy.nodes import CallExpr, Decorator, Expression, NameExpr, Statement
from mypy.plugin import AttributeContext, ClassDefContext, FunctionContext, Plugin
from mypy.types import AnyType, CallableType, LiteralType, Type, TypeOfAny, UnboundType, UnionType, get_proper_type

PATCH = "patch"
KINDS = {"as_prop": "property", "cls_method": "classmethod", "static_method": "staticmethod"}
MODULE_ATTRIBUTE = "torch.nn.modules.module.Module."
PACKAGE = "zsad_nb."


def _is_patch(decorator: Expression) -> bool:
    name = decorator.callee if isinstance(decorator, CallExpr) else decorator
    return isinstance(name, NameExpr) and name.name == PATCH


def _patched_class(statement: Statement) -> str | None:
    "Name of the class that a `@patch`ed function is for: the annotation of its first parameter."
    if not isinstance(statement, Decorator) or not any(map(_is_patch, statement.decorators)):
        return None
    signature = statement.func.type
    owner = signature.arg_types[0] if isinstance(signature, CallableType) and signature.arg_types else None
    return owner.name if isinstance(owner, UnboundType) else None


def _as_method(patched: Decorator) -> Statement:
    "The function as it would stand in the class: `@patch(as_prop=True)` becomes `@property`, the first parameter is bare."
    function = patched.func
    assert isinstance(function.type, CallableType)
    function.type.arg_types[0] = AnyType(TypeOfAny.unannotated)
    if isinstance(function.unanalyzed_type, CallableType):
        function.unanalyzed_type.arg_types[0] = AnyType(TypeOfAny.unannotated)
    function.arguments[0].type_annotation = None
    decorators = []
    for decorator in patched.decorators:
        if not _is_patch(decorator):
            decorators.append(decorator)
        elif isinstance(decorator, CallExpr):
            decorators += [_named(KINDS[kind], decorator) for kind in decorator.arg_names if kind in KINDS]
    patched.decorators = decorators
    patched.original_decorators = list(decorators)
    function.is_decorated = bool(decorators)
    return patched if decorators else function


def _named(name: str, place: Expression) -> NameExpr:
    node = NameExpr(name)
    node.set_line(place)
    return node


def _adopt_patches(context: ClassDefContext) -> None:
    "Move the functions of the module that are patched into this class to the end of the class."
    module = context.api.cur_mod_node
    mine = [statement for statement in module.defs if _patched_class(statement) == context.cls.name]
    for statement in mine:
        module.defs.remove(statement)
        context.cls.defs.body.append(_as_method(statement))


def _anything(context: AttributeContext) -> Type:
    return AnyType(TypeOfAny.special_form)


def _without_zero(context: FunctionContext) -> Type:
    result = get_proper_type(context.default_return_type)
    if not isinstance(result, UnionType):
        return result
    return UnionType.make_union([t for t in result.items if not isinstance(get_proper_type(t), LiteralType)])


class ZSADPlugin(Plugin):
    def get_customize_class_mro_hook(self, fullname: str):
        return _adopt_patches if fullname.startswith(PACKAGE) else None

    def get_function_hook(self, fullname: str):
        return _without_zero if fullname == "builtins.sum" else None

    def get_attribute_hook(self, fullname: str):
        return _anything if fullname.startswith(MODULE_ATTRIBUTE) else None


def plugin(version: str):
    return ZSADPlugin
