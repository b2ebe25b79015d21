"""WebShop's pages as text, and how its actions are read."""

from __future__ import annotations

from collections.abc import Sequence

from w2sjax.envs.webshop_catalogue import Product

OBSERVATIONS = ("full", "short")
BACK, NEXT, PREVIOUS, BUY = "back to search", "next >", "< prev", "buy now"
SUB_PAGES = ("description", "features", "reviews")
_NOTHING = "Nothing happens."


def parse_action(action: str) -> tuple[str, str]:
    """An action's verb and argument, as the published `(.+)\\[(.+)\\]` reads them at the start.

    The argument comes in lower case; it is "" where the action does not have the form. Unlike the
    regular expression, this takes linear time.

    >>> parse_action("search[Red shoes [wide]]")
    ('search[Red shoes ', 'wide]')
    >>> parse_action("click[Buy Now] now")
    ('click', 'buy now')
    """
    line = action.partition("\n")[0]
    end = line.rfind("]")
    start = line.rfind("[", 1, max(0, end - 1))
    return (line[:start], line[start + 1 : end].lower()) if start > 0 else (line, "")


class Pages:
    """Renders pages.

    Args:
      observation: "full" or "short"; see `WebShop`.
      page_size: products per page of results.
    """

    def __init__(self, observation: str, page_size: int):
        self._short = observation == "short"
        self._page_size = page_size

    def first(self, instruction: str) -> str:
        """The page that an episode starts on; it always has the instruction."""
        return instruction if self._short else self.index(instruction)

    def index(self, instruction: str) -> str:
        if self._short:
            return "Search page."
        return _joined("WebShop", "Instruction:", instruction, "Search")

    def results(self, instruction: str, products: Sequence[Product], page: int, total: int) -> str:
        if self._short:
            pages = max(page, -(-total // self._page_size))
            lines = [f"Page {page} of {pages}."]
            lines += [f"{p.asin.lower()} {p.title} {p.price_tag}" for p in products]
            return "\n".join(lines)
        texts = [f"Page {page} (Total results: {total})"]
        texts += ["< Prev"] if page > 1 else []
        texts.append("Next >")
        for product in products:
            texts += [product.asin, product.title, product.price_tag]
        return self._full(instruction, *texts)

    def item(self, instruction: str, product: Product) -> str:
        if self._short:
            lines = [f"{product.title} {product.price_tag}"]
            lines += [f"{name}: {', '.join(values)}" for name, values in product.options.items()]
            return "\n".join(lines)
        options = [text for name, values in product.options.items() for text in (name, *values)]
        price, rating = f"Price: {product.price_tag}", "Rating: N.A."
        buttons = ("Description", "Features", "Reviews", "Buy Now")
        return self._full(instruction, "< Prev", *options, product.title, price, rating, *buttons)

    def sub_page(self, instruction: str, product: Product, name: str) -> str:
        texts = {"description": (product.description,), "features": product.bullets}.get(name, ())
        if self._short:
            return "\n".join(texts) or f"No {name}."
        return self._full(instruction, "< Prev", *texts)

    def choice(self, name: str, value: str, page: str) -> str:
        """What follows the choice of an option's value; `page` is the page as it is now."""
        return f"You choose {name}: {value}." if self._short else page

    def nothing(self, page: str) -> str:
        """What follows an action without meaning."""
        return _NOTHING if self._short else page

    def done(self) -> str:
        return "You bought it." if self._short else "Thank you for shopping with us!"

    def _full(self, instruction: str, *texts: str) -> str:
        return _joined("Instruction:", instruction, "Back to Search", *texts)


def _joined(*texts: str) -> str:
    return " [SEP] ".join(text.strip() for text in texts)
