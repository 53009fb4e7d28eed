"""Slow, loop-by-loop restatements of the losses in float64, and gradients by finite differences: no torch in here."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def unit(rows: np.ndarray) -> np.ndarray:
    """The rows, each divided by its own length."""
    return rows / np.sqrt((rows * rows).sum(axis=1, keepdims=True))


def unit_rows(generator: np.random.Generator, count: int, dim: int) -> np.ndarray:
    """`count` random directions in `dim` dimensions."""
    return unit(generator.standard_normal((count, dim)))


def softmax_row(row) -> list[float]:
    """exp(x) / sum exp(x), element by element."""
    largest = max(row)
    exponentials = [math.exp(value - largest) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def matching(logits: np.ndarray, positives: np.ndarray) -> float:
    """The mean over rows of the mean over that row's positives of -log softmax."""
    rows = []
    for i in range(len(logits)):
        probabilities = softmax_row(logits[i])
        chosen = [-math.log(probabilities[j]) for j in range(len(probabilities)) if positives[i][j]]
        rows.append(sum(chosen) / len(chosen))
    return sum(rows) / len(rows)


def logits_of(left: np.ndarray, right: np.ndarray, scale: float) -> np.ndarray:
    """scale * dot product of every left row with every right row."""
    out = np.zeros((len(left), len(right)))
    for i in range(len(left)):
        for j in range(len(right)):
            out[i, j] = scale * sum(a * b for a, b in zip(left[i], right[j], strict=True))
    return out


def clip(u, v, scale, positives) -> float:
    by_image, by_text = logits_of(u, v, scale), logits_of(v, u, scale)
    return (matching(by_image, positives) + matching(by_text, np.transpose(positives))) / 2


def siglip(u, v, scale, bias, positives) -> float:
    total = 0.0
    for i in range(len(u)):
        for j in range(len(v)):
            logit = scale * float(np.dot(u[i], v[j])) + bias
            probability = 1 / (1 + math.exp(-logit))
            total -= math.log(probability if positives[i][j] else 1 - probability)
    return total / len(u)


def affinity(u, v, p, q, student_scale, teacher_scale, temperature=1.0, form="kl") -> float:
    directions = []
    for left, right, teacher_left, teacher_right in ((u, v, p, q), (v, u, q, p)):
        student = logits_of(left, right, student_scale / temperature)
        teacher = logits_of(teacher_left, teacher_right, teacher_scale / temperature)
        total = 0.0
        for i in range(len(student)):
            student_row, teacher_row = softmax_row(student[i]), softmax_row(teacher[i])
            for t, s in zip(teacher_row, student_row, strict=True):
                total += t * math.log(t / s) if form == "kl" else -t * math.log(s)
        directions.append(total / len(student))
    return temperature**2 * sum(directions) / 2


def one_minus_cosine(u, p) -> float:
    values = []
    for a, b in zip(u, p, strict=True):
        values.append(1 - float(np.dot(a, b)))
    return sum(values) / len(values) if values else 0.0


def mse(u, p) -> float:
    squares = [(a - b) ** 2 for left, right in zip(u, p, strict=True) for a, b in zip(left, right, strict=True)]
    return sum(squares) / len(squares) if squares else 0.0


def interactive(u, v, p, q, scale, positives) -> float:
    by_image, by_text = logits_of(u, q, scale), logits_of(v, p, scale)
    return (matching(by_image, positives) + matching(by_text, np.transpose(positives))) / 2


def kl(target: np.ndarray, student: np.ndarray) -> float:
    """The mean over rows of KL between two tables of logits."""
    total = 0.0
    for target_row, student_row in zip(target, student, strict=True):
        for t, s in zip(softmax_row(target_row), softmax_row(student_row), strict=True):
            total += t * math.log(t / s)
    return total / len(target)


def vertical(u, v, p, q, image_scale, text_scale, same_images, same_texts) -> float:
    """CLIP-RD's VRD: both divergences, and the four cross entropies within a modality, halved."""
    texts, texts_back = logits_of(q, v, text_scale), logits_of(v, q, text_scale)
    images, images_back = logits_of(p, u, image_scale), logits_of(u, p, image_scale)
    relation = kl(texts, images) + kl(texts_back, images_back)
    within = matching(images, same_images) + matching(images_back, same_images)
    return (relation + within + matching(texts, same_texts) + matching(texts_back, same_texts)) / 2


def vertical_fixed(u, v, p, q, image_scale, text_scale, same_images, same_texts, fixed) -> float:
    """The same with the divergences' targets taken from other rows, ``fixed``: what stop-gradient means."""
    texts, texts_back = logits_of(q, fixed, text_scale), logits_of(fixed, q, text_scale)
    images, images_back = logits_of(p, u, image_scale), logits_of(u, p, image_scale)
    own, own_back = logits_of(q, v, text_scale), logits_of(v, q, text_scale)
    relation = kl(texts, images) + kl(texts_back, images_back)
    within = matching(images, same_images) + matching(images_back, same_images)
    return (relation + within + matching(own, same_texts) + matching(own_back, same_texts)) / 2


def cross(u, v, p, q, scale, fixed=None) -> float:
    """CLIP-RD's XRD; ``fixed`` are the student's rows that the targets are made of, where they are others."""
    fixed_u, fixed_v = (u, v) if fixed is None else fixed
    pairs = [
        (logits_of(q, fixed_u, scale), logits_of(p, v, scale)),
        (logits_of(p, fixed_v, scale), logits_of(q, u, scale)),
        (logits_of(fixed_u, q, scale), logits_of(v, p, scale)),
        (logits_of(fixed_v, p, scale), logits_of(u, q, scale)),
    ]
    return sum(kl(target, student) for target, student in pairs) / 4


def among(u, p, others, scale, temperature) -> float:
    """T^2 KL between the teacher's and the student's similarities to some of the teacher's rows."""
    return temperature**2 * kl(logits_of(p, others, scale / temperature), logits_of(u, others, scale / temperature))


def clip_gradients(u, v, scale, positives) -> list[np.ndarray]:
    """The gradients of both halves of the CLIP loss, by finite differences."""
    halves = [
        lambda u, v: matching(logits_of(u, v, scale), positives),
        lambda u, v: matching(logits_of(v, u, scale), np.transpose(positives)),
    ]
    found = []
    for half in halves:
        found.append(gradient(lambda x, half=half: half(x, v), u))
        found.append(gradient(lambda x, half=half: half(u, x), v))
    return found


def gradient_distance(u, v, p, q, student_scale, teacher_scale, positives) -> float:
    ours, theirs = clip_gradients(u, v, student_scale, positives), clip_gradients(p, q, teacher_scale, positives)
    return sum(mse(a, b) for a, b in zip(ours, theirs, strict=True))


def augmented(u, v, p, q, image, text, scale, positives) -> float:
    """CLIP on linear maps, each a weight and a bias, of student and teacher side by side."""
    sides = []
    for ours, theirs, (weight, bias) in ((u, p, image), (v, q, text)):
        rows = [weight @ np.concatenate([a, b]) + bias for a, b in zip(ours, theirs, strict=True)]
        sides.append(unit(np.array(rows)))
    return clip(*sides, scale, positives)


def mixture(left, right, members, temperature=1.0) -> np.ndarray:
    """The weighted mean of the members' softmaxes [rows, columns]; a member is (columns, scale, weight)."""
    whole = sum(weight for _, _, weight in members)
    out = np.zeros((len(left), len(right)))
    for columns, scale, weight in members:
        logits = logits_of(unit(left[:, columns]), unit(right[:, columns]), scale / temperature)
        out += np.array([softmax_row(row) for row in logits]) * (weight / whole)
    return out


def gradient(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """d function / d at, one element after the other, by central differences (error of order step^2)."""
    out = np.zeros_like(at, dtype=np.float64)
    for index in np.ndindex(*at.shape):
        above, below = np.array(at, dtype=np.float64), np.array(at, dtype=np.float64)
        above[index] += step
        below[index] -= step
        out[index] = (function(above) - function(below)) / (2 * step)
    return out
