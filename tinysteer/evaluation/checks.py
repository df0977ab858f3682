"""The 25 checks of IFEval, each a function of a text and of what its instruction names.

What a check counts is what the official one counts, its oddities included, since figures are
compared with others'; keywords are regular expressions, as there.
"""

import json
import operator
import re
from collections.abc import Callable, Sequence
from types import ModuleType

RELATIONS = {"less than": operator.lt, "at least": operator.ge}


def compare(count: int, relation: str, threshold: int) -> bool:
    if relation not in RELATIONS:
        raise ValueError(f"relation is {relation!r}: use {' or '.join(map(repr, RELATIONS))}")
    return RELATIONS[relation](count, threshold)


def existence(text: str, keywords: Sequence[str]) -> bool:
    """All of them, also within other words."""
    return all(re.search(keyword, text, re.IGNORECASE) for keyword in keywords)


def frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    found = re.findall(keyword.strip(), text, re.IGNORECASE)
    return compare(len(found), relation, frequency)


def forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    """None of them as a whole word."""
    words = (rf"\b{word}\b" for word in forbidden_words)
    return not any(re.search(word, text, re.IGNORECASE) for word in words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def needs(module: str) -> ModuleType:
    """The module, if the extra `eval` is installed. ImportError says how to get it."""
    try:
        return __import__(module, fromlist=["*"])
    except ImportError as error:
        raise ImportError(f'{module} is missing: pip install "tinysteer[eval]"') from error


def is_language(text: str, language: str) -> bool:
    """language is an ISO code, "zh-cn" for Chinese. True too where nothing tells a language."""
    langdetect = needs("langdetect")
    langdetect.DetectorFactory.seed = 0  # it draws samples, and would answer now so, now so
    try:
        return langdetect.detect(text) == language
    except langdetect.LangDetectException:
        return True


def english_capital(text: str) -> bool:
    return text.isupper() and is_language(text, "en")


def english_lowercase(text: str) -> bool:
    return text.islower() and is_language(text, "en")


def sentences(text: str) -> list[str]:
    return needs("punkt").sent_tokenize(text)


def number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return compare(len(sentences(text)), relation, num_sentences)


def number_words(text: str, num_words: int, relation: str) -> bool:
    return compare(len(re.findall(r"\w+", text)), relation, num_words)


def pieces(text: str, mark: str) -> list[str] | None:
    """The text between marks, less a blank first or last piece. None if an inner one is blank."""
    parts = re.split(mark, text)
    if any(not part.strip() for part in parts[1:-1]):
        return None
    return [part for part in parts if part.strip()]


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Exactly as many, parted by ***."""
    paragraphs = pieces(text, r"\s?\*\*\*\s?")
    return paragraphs is not None and len(paragraphs) == num_paragraphs


def nth_paragraph_first_word(
    text: str, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """Paragraphs parted by a blank line. Blank ones do not count, yet keep their place."""
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    count = sum(map(bool, paragraphs))
    if nth_paragraph > count or not (paragraph := paragraphs[nth_paragraph - 1]):
        return False
    word = paragraph.split()[0].lstrip("'").lstrip('"')
    word = re.split(r"[.,?!'\"]", word)[0].lower()
    return count == num_paragraphs and word == first_word.lower()


def number_placeholders(text: str, num_placeholders: int) -> bool:
    """At least as many [in brackets] on one line."""
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


POSTSCRIPTS = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}


def postscript(text: str, postscript_marker: str) -> bool:
    mark = POSTSCRIPTS.get(postscript_marker, rf"\s*{postscript_marker.lower()}.*$")
    return bool(re.search(mark, text.lower(), re.MULTILINE))


def number_bullet_lists(text: str, num_bullets: int) -> bool:
    """Exactly as many lines that begin with * or -, rules of hyphens included."""
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    hyphens = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(hyphens) == num_bullets


ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def constrained_response(text: str) -> bool:
    return any(answer in text for answer in ANSWERS)


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """At least as many *texts between stars*, single or double."""
    single = (mark.strip("*") for mark in re.findall(r"\*[^\n\*]*\*", text))
    double = (mark[2:-2] for mark in re.findall(r"\*\*[^\n\*]*\*\*", text))
    return sum(bool(mark.strip()) for mark in (*single, *double)) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least as many headings, such as "Section 1". The name is spelt as in IFEval."""
    headings = re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", text)
    return len(headings) - 1 >= num_sections


def json_format(text: str) -> bool:
    """Anything that json reads, fenced or not."""
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def title(text: str) -> bool:
    """Somewhere <<a title>>, on one line."""
    marks = re.findall(r"<<[^\n]+>>", text)
    return any(mark.lstrip("<").rstrip(">").strip() for mark in marks)


def two_responses(text: str) -> bool:
    """Two that differ, parted by ******."""
    responses = pieces(text, r"\*{6}")
    return (
        responses is not None
        and len(responses) == 2
        and responses[0].strip() != responses[1].strip()
    )


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    tokenize = needs("nltk.tokenize").NLTKWordTokenizer().tokenize
    capitals = [word for line in sentences(text) for word in tokenize(line) if word.isupper()]
    return compare(len(capitals), capital_relation, capital_frequency)


def no_comma(text: str) -> bool:
    return "," not in text


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": is_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
