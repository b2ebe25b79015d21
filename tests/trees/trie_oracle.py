"""The slow, plain-Python meaning of trees, backups, search and paths: what tests compare with."""

from __future__ import annotations

import math
from collections import deque


class Node:
    """A node of a dict trie; children in the order in which trajectories first take them."""

    def __init__(self, parent=None, depth=0, key=-1):
        self.parent, self.depth, self.key = parent, depth, key
        self.children = {}
        self.through = []  # trajectory ids
        self.ending = []
        self.visits, self.value_sum = 0, 0.0
        self.stop_visits, self.stop_sum = 0, 0.0
        self.prior = self.stop_prior = 0.0
        self.index = -1


class Trie:
    """Trajectories (lists of keys) of one task; None is a row that is no trajectory."""

    def __init__(self, trajectories, returns):
        self.returns = [float(x) for x in returns]
        self.root = Node()
        for i, keys in enumerate(trajectories):
            if keys is None:
                continue
            node = self.root
            node.through.append(i)
            for key in keys:
                if key not in node.children:
                    node.children[key] = Node(node, node.depth + 1, key)
                node = node.children[key]
                node.through.append(i)
            node.ending.append(i)
        self.nodes = []
        queue = deque([self.root])
        while queue:
            node = queue.popleft()
            node.index = len(self.nodes)
            self.nodes.append(node)
            queue.extend(node.children.values())

    def mean(self, ids):
        return sum(self.returns[i] for i in ids) / len(ids)

    # Backups ------------------------------------------------------------------------------------

    def backup_mean(self, node):
        return self.mean(node.through)

    def backup_max(self, node, discount):
        options = [discount * self.backup_max(c, discount) for c in node.children.values()]
        if node.ending:
            options.append(self.mean(node.ending))
        return max(options)

    def backup_soft(self, node, temperature, discount):
        parts = [
            (len(c.through), discount * self.backup_soft(c, temperature, discount))
            for c in node.children.values()
        ]
        if node.ending:
            parts.append((len(node.ending), self.mean(node.ending)))
        total = sum(n for n, _ in parts)
        return temperature * math.log(
            sum(n / total * math.exp(value / temperature) for n, value in parts)
        )

    # Search -------------------------------------------------------------------------------------

    def search(self, simulations, weight=1.41, discount=1.0, stop_as_child=True, puct=False):
        """UCT as the paper's code does it (stop_as_child=False), and its extensions."""
        for node in self.nodes:
            node.visits, node.value_sum, node.stop_visits, node.stop_sum = 0, 0.0, 0, 0.0
        for _ in range(simulations):
            node, path = self.root, [self.root]
            stopped = False
            while node.children and not stopped:
                choice = self._select(node, weight, discount, stop_as_child, puct)
                if choice is None:
                    stopped = True
                else:
                    node = choice
                    path.append(node)
            value = self.mean(node.ending)
            node.stop_visits += 1
            node.stop_sum += value
            for node in reversed(path):
                node.visits += 1
                node.value_sum += value
                value *= discount

    def _select(self, node, weight, discount, stop_as_child, puct):
        choices = [(c, c.visits, discount * c.value_sum, c.prior) for c in node.children.values()]
        if stop_as_child and node.ending:
            choices.insert(0, (None, node.stop_visits, node.stop_sum, node.stop_prior))
        total = sum(n for _, n, _, _ in choices)
        best, best_score = None, -math.inf
        for choice, n, value_sum, prior in choices:
            if puct:
                q = value_sum / n if n else 0.0
                score = q + weight * prior * math.sqrt(total) / (1 + n)
            elif n == 0:
                score = math.inf
            else:
                score = value_sum / n + weight * math.sqrt(math.log(total) / n)
            if score > best_score:
                best, best_score = choice, score
        return best

    def set_priors(self, logps, temperature=1.0):
        """logps[i][t]; see `step_priors`."""
        for node in self.nodes:
            going = len(node.through) - len(node.ending)
            weights = {}
            for key, c in node.children.items():
                p = sum(math.exp(logps[i][node.depth]) for i in c.through) / len(c.through)
                weights[key] = p ** (1 / temperature)
            total = sum(weights.values())
            for key, c in node.children.items():
                c.prior = weights[key] / total * going / len(node.through)
            node.stop_prior = 1 - sum(c.prior for c in node.children.values())

    # Paths --------------------------------------------------------------------------------------

    def best_path(self, values, discount=1.0, allow_stop=True):
        """Node indices; `values` per node index."""
        node, path = self.root, [0]
        while node.children:
            best = max(node.children.values(), key=lambda c: values[c.index])  # the first maximum
            stop = self.mean(node.ending) if allow_stop and node.ending else -math.inf
            if stop >= discount * values[best.index]:
                break
            node = best
            path.append(node.index)
        return path
