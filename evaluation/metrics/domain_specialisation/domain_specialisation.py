"""How far the experts of a Mixture-of-Experts model specialise by domain, against what chance gives."""

import math

import datasets
import evaluate
import numpy as np
import tqdm

_DESCRIPTION = """
Domain specialisation: what a token's domain says about the experts it selects, layer by layer. With s_g(e) the share
of domain g's selections that goes to expert e, all G domains weighing the same, m = mean_g s_g, and H the entropy in
bits:

    mutual_information             I = H(m) - mean_g H(s_g)            0 (all alike) .. log2 min(G, E), bits
    normalised_mutual_information  I / min(log2 G, H(m))               0 .. 1 (one tells the other), no unit
    jensen_shannon                 mean over pairs of domains g, h of
                                   H((s_g + s_h)/2) - (H(s_g) + H(s_h))/2   0 (alike) .. 1 (no expert shared), bits
    domain_specialisation          K s_g(e): tokens of g that selected e / tokens of g
                                                                       0 .. 1, uniform K/E, no unit

A finite sample shows some mutual information by chance, and more than chance may not be due to domains. Three nulls:

- Permuted labels: domain labels are dealt out anew among the documents, of which windows of one document are parts.
  Its mean and 95 % quantile in bits, and p_value = (1 + permutations that reach I) / (1 + permutations). The document
  is what is exchangeable if domains do not matter: to permute windows or tokens makes anything look specialised.
- Token identity (`token_load`): the mutual information of a load predicted from each token's identity alone, without
  its context. What exceeds it is in the context.
- An untrained router (`untrained_load`): the mutual information of the same text's load before training. What exceeds
  it was learnt.

The expert of a layer is compared with the domain; layers are averaged, never pooled.
"""

_KWARGS_DESCRIPTION = """
Args:
    domain (list of str): the domain of each item, a document or a window of one.
    document (list of int): the document of each item; windows of one document have the same, in all processes.
    load (list of [L][E] int): for each item, how many of its tokens selected each expert in each layer.
    token_load (list of [L][E] float): only in a configuration with "token_load". For each item, the selections that
        the identities of its tokens predict: the sum over its tokens of an expert's share among the selections of
        that token elsewhere.
    untrained_load (list of [L][E] int): only in a configuration with "untrained_load". As `load`, of the model with
        which training began.
    index (list of int): only in a configuration with "index". Items with the same index are one item and count once.
        Configurations join names by "+": "index+token_load+untrained_load".
    num_experts_per_tok (int): K, experts selected by each token; must be given.
    permutations (int): how often labels are dealt out anew.
    seed (int): seeds the permutations.
    return_items (bool): whether to return `items` too.
Returns:
    mutual_information, normalised_mutual_information, jensen_shannon: means over layers.
    null_mean, null_quantile_95, p_value: of the mean over layers of the mutual information, under permuted labels.
    token_identity, token_identity_normalised: mutual information of `token_load`, mean over layers, if it is there.
    untrained, untrained_normalised: mutual information of `untrained_load`, mean over layers, if it is there.
    domains: their names, sorted; the order of every list over domains.
    uniform: K/E.
    num_items, num_documents: how many.
    layers: each of the measures above as a list with one value per layer; and domain_specialisation [L][G][E],
        jensen_shannon_pairs [L][G][G].
    items: columns with one value per item, in input order, or in order of the index: domain; pointwise_bits, in each
        layer the mean over the item's selections of log2(s_g(e) / m(e)), of which the mean weighted by selections
        within a domain, averaged over domains, is the mutual information (nan without tokens); index.
Raises:
    ValueError: there is no item or only one domain, a load has not the form [L][E] of the others, holds a negative or
        impossible count, or sums to 0 over a domain or a document, a document is in two domains, num_experts_per_tok
        is not given, permutations is below 1, or items with the same index differ in domain, document or selections.
Examples:
    >>> metric = evaluate.load("evaluation/metrics/domain_specialisation")
    >>> result = metric.compute(
    ...     domain=["code", "code", "law", "law"],
    ...     document=[0, 1, 2, 3],
    ...     load=[[[8, 0]], [[6, 0]], [[0, 5]], [[0, 9]]],
    ...     num_experts_per_tok=1,
    ... )
    >>> result["normalised_mutual_information"], result["jensen_shannon"]
    (1.0, 1.0)
"""

_CITATION = """
@article{muennighoff2024olmoe,
    title={OLMoE: Open Mixture-of-Experts Language Models},
    author={Muennighoff, Niklas and others},
    journal={arXiv:2409.02060},
    note={Section 5.3, domain specialization},
    year={2024}
}
@article{qiu2025demons,
    title={Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized Mixture-of-Expert
        Models},
    author={Qiu, Zihan and others},
    journal={arXiv:2501.11873},
    note={Load by domain},
    year={2025}
}
@article{lin1991divergence,
    title={Divergence measures based on the Shannon entropy},
    author={Lin, Jianhua},
    journal={IEEE Transactions on Information Theory},
    year={1991}
}
"""

_COUNTS = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
_OPTIONAL = {
    "index": datasets.Value("int64"),
    "token_load": datasets.Sequence(datasets.Sequence(datasets.Value("float64"))),
    "untrained_load": _COUNTS,
}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class DomainSpecialisation(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "domain": datasets.Value("string"),
                    "document": datasets.Value("int64"),
                    "load": _COUNTS,
                    **_optional_features(self.config_name, _OPTIONAL),
                }
            ),
        )

    def _compute(
        self,
        *,
        num_experts_per_tok: int = 0,
        permutations: int = 1000,
        seed: int = 0,
        return_items: bool = False,
        **columns: list,
    ) -> dict:
        if num_experts_per_tok < 1:
            raise ValueError(f"num_experts_per_tok must be given, and at least 1; got {num_experts_per_tok}")
        if permutations < 1:
            raise ValueError(f"permutations must be at least 1; got {permutations}")
        _check_given(columns)
        tables = {}
        for name in [name for name in ("load", "token_load", "untrained_load") if name in columns]:
            tables[name] = _tables(name, columns[name], float if name == "token_load" else np.int64)
            if tables[name].shape != tables["load"].shape:
                raise ValueError(
                    f"{name} must have the layers and experts of load, {tables['load'].shape[1:]}; "
                    f"got {tables[name].shape[1:]}"
                )
            if name != "token_load":
                _check_selections(name, tables[name], num_experts_per_tok)
            columns[name] = list(tables[name])
        columns["sum of load"] = tables["load"].sum((1, 2)).tolist()
        columns = _distinct(columns, same=("domain", "document", "sum of load"))
        tables = {name: np.stack(columns[name]) for name in tables}

        domains = sorted(set(columns["domain"]))
        if len(domains) < 2:
            raise ValueError(f"domain must have at least two values; got {domains}")
        _check_documents(columns["document"], columns["domain"])
        of_item = np.array([domains.index(name) for name in columns["domain"]])
        shares = {name: _shares_by_domain(name, table, of_item, domains) for name, table in tables.items()}
        bits = _mutual_information(shares["load"])
        null = _permutation_null(tables["load"], columns["document"], of_item, len(domains), permutations, seed)
        pairs = _jensen_shannon(shares["load"])

        above = np.triu_indices(len(domains), 1)
        layers = {
            "mutual_information": bits,
            "normalised_mutual_information": _normalised(shares["load"]),
            "jensen_shannon": pairs[:, *above].mean(-1),
        }
        for name, short in (("token_load", "token_identity"), ("untrained_load", "untrained")):
            if name in shares:
                layers[short] = _mutual_information(shares[name])
                layers[f"{short}_normalised"] = _normalised(shares[name])
        result: dict = {name: math.fsum(values.tolist()) / len(values) for name, values in layers.items()}
        of_mean = _compared(bits.mean(keepdims=True), null.mean(1, keepdims=True))
        result |= {name: values.item() for name, values in of_mean.items()}
        layers |= _compared(bits, null)
        layers["domain_specialisation"] = (shares["load"] * num_experts_per_tok).transpose(1, 0, 2)
        layers["jensen_shannon_pairs"] = pairs
        result |= {
            "domains": domains,
            "uniform": num_experts_per_tok / tables["load"].shape[-1],
            "num_items": len(of_item),
            "num_documents": len(set(columns["document"])),
            "layers": {name: values.tolist() for name, values in layers.items()},
        }
        if return_items:
            pointwise = _pointwise_bits(tables["load"], shares["load"], of_item)
            index = {name: columns[name] for name in columns if name == "index"}
            result["items"] = {"domain": columns["domain"], "pointwise_bits": pointwise.tolist(), **index}
        return result


def _shares_by_domain(name: str, table: np.ndarray, of_item: np.ndarray, domains: list[str]) -> np.ndarray:
    """`table` [N, L, E] -> the share of each domain's selections that goes to each expert [G, L, E]."""
    total = np.stack([_exact_sum(table[of_item == domain]) for domain in range(len(domains))])
    for domain, layer in np.argwhere(total.sum(-1) == 0):
        raise ValueError(
            f"{name} must count a token of each domain in each layer; got none of {domains[domain]!r} in layer {layer}"
        )
    return total / total.sum(-1, keepdims=True)


def _exact_sum(table: np.ndarray) -> np.ndarray:
    """Sum over items, rounded once, so that their order does not matter: [N, L, E] -> [L, E] float64."""
    if table.dtype == np.int64:
        return table.sum(0).astype(float)
    cells = table.reshape(len(table), -1).T.tolist()
    return np.array([math.fsum(cell) for cell in cells]).reshape(table.shape[1:])


def _entropy(shares: np.ndarray) -> np.ndarray:
    """Entropy in bits over the last dimension."""
    return -(shares * np.log2(shares, out=np.zeros_like(shares), where=shares > 0)).sum(-1)


def _mutual_information(shares: np.ndarray) -> np.ndarray:
    """[G, L, E] -> [L] bits."""
    return np.maximum(_entropy(shares.mean(0)) - _entropy(shares).mean(0), 0)


def _normalised(shares: np.ndarray) -> np.ndarray:
    """Mutual information / min(H(domain), H(expert)): [G, L, E] -> [L]; 0 where an expert takes everything."""
    limit = np.minimum(_entropy(shares.mean(0)), math.log2(len(shares)))
    certain = limit < 1e-12
    return np.where(certain, 0, np.minimum(_mutual_information(shares) / np.where(certain, 1, limit), 1))


def _jensen_shannon(shares: np.ndarray) -> np.ndarray:
    """Divergence of each pair of domains: [G, L, E] -> [L, G, G] bits."""
    of_one = _entropy(shares)  # [G, L]
    of_both = _entropy((shares[:, None] + shares) / 2)  # [G, G, L]
    divergence = np.clip(of_both - (of_one[:, None] + of_one) / 2, 0, 1)
    return divergence.transpose(2, 0, 1)


def _permutation_null(
    table: np.ndarray, documents: list[int], of_item: np.ndarray, num_domains: int, permutations: int, seed: int
) -> np.ndarray:
    """Mutual information when labels are dealt out anew among the documents: [P, L] bits."""
    ids, of_document = np.unique(documents, return_inverse=True)  # sorted: whatever order the items came in
    load = np.zeros((len(ids), *table.shape[1:]), dtype=np.int64)
    np.add.at(load, of_document, table)
    for document in ids[load[:, 0].sum(-1) == 0]:
        raise ValueError(f"load must count at least one token of each document; got none of document {document}")
    domain = np.zeros(len(ids), dtype=np.int64)
    domain[of_document] = of_item
    flat = load.reshape(len(ids), -1).astype(float)  # of whole numbers, so that sums are exact
    generator = np.random.default_rng(seed)
    null = []
    for _ in tqdm.trange(permutations, desc="permuting", disable=None):
        member = np.eye(num_domains)[generator.permutation(domain)]  # [U, G]
        total = (member.T @ flat).reshape(num_domains, *table.shape[1:])
        null.append(_mutual_information(total / total.sum(-1, keepdims=True)))
    return np.stack(null)


def _compared(bits: np.ndarray, null: np.ndarray) -> dict[str, np.ndarray]:
    """What permuted labels say of mutual information: `bits` [L], `null` [P, L] -> [L] each."""
    # A permutation that only renames the groups is the observed value but for rounding.
    reached = (null >= bits - 1e-12).sum(0)
    return {
        "null_mean": null.mean(0),
        "null_quantile_95": np.quantile(null, 0.95, axis=0),
        "p_value": (1 + reached) / (1 + len(null)),
    }


def _pointwise_bits(table: np.ndarray, shares: np.ndarray, of_item: np.ndarray) -> np.ndarray:
    """Mean over an item's selections of log2(s_g(e) / m(e)): [N, L, E], [G, L, E] -> [N, L]."""
    present = shares > 0
    ratio = np.log2(shares / shares.mean(0), out=np.zeros_like(shares), where=present)
    selections = table.sum(-1)
    return (table * ratio[of_item]).sum(-1) / np.where(selections, selections, np.nan)


def _check_selections(name: str, table: np.ndarray, num_experts_per_tok: int) -> None:
    """Whether each layer of each item counts the same tokens, each of which selected K different experts."""
    selections = table.sum(-1)  # [N, L]
    for item, layers in enumerate(selections.tolist()):
        if len(set(layers)) > 1 or layers[0] % num_experts_per_tok:
            raise ValueError(
                f"{name} must sum to num_experts_per_tok ({num_experts_per_tok}) times the item's tokens in each "
                f"layer; got {layers} in item {item}"
            )
        if table[item].max() > layers[0] // num_experts_per_tok:
            raise ValueError(
                f"{name} must be at most the item's tokens ({layers[0] // num_experts_per_tok}); "
                f"got {table[item].max()} in item {item}"
            )


def _check_documents(documents: list[int], domains: list[str]) -> None:
    domain_of: dict[int, str] = {}
    for item, (document, domain) in enumerate(zip(documents, domains, strict=True)):
        if domain_of.setdefault(document, domain) != domain:
            raise ValueError(
                f"document must be of one domain; got document {document} of {domain_of[document]!r} and, in item "
                f"{item}, of {domain!r}"
            )


def _optional_features(config_name: str, optional: dict) -> dict:
    """The optional features that the configuration names, joined by "+"; "default" has none."""
    names = [] if config_name == "default" else config_name.split("+")
    for name in names:
        if name not in optional:
            raise ValueError(f"config_name must join names of {sorted(optional)} by '+'; got {config_name!r}")
    return {name: optional[name] for name in names}


def _check_given(columns: dict[str, list]) -> None:
    for name, column in columns.items():
        if not column:
            raise ValueError(f"{name} must hold at least one item; got none")
        if None in column:
            raise ValueError(f"{name} must be given for every item; got None in item {column.index(None)}")


def _distinct(columns: dict[str, list], same: tuple[str, ...]) -> dict[str, list]:
    """The first item of each index, in order of the index; without an index, all items as they came.

    Raises:
        ValueError: two items have one index, but differ in a column of `same`, which describes the item itself.
    """
    if "index" not in columns:
        return columns
    first: dict[int, int] = {}
    for item, number in enumerate(columns["index"]):
        kept = first.setdefault(number, item)
        for name in same:
            if columns[name][item] != columns[name][kept]:
                raise ValueError(
                    f"index must name one item; got {number} for items {kept} and {item}, whose {name} differ: "
                    f"{columns[name][kept]!r} and {columns[name][item]!r}"
                )
    order = [first[number] for number in sorted(first)]
    return {name: [column[item] for item in order] for name, column in columns.items()}


def _tables(name: str, column: list, kind: type) -> np.ndarray:
    """The tables [L][E] of all items as one array [N, L, E]."""
    shape = (len(column[0]), len(column[0][0]) if column[0] else 0)
    if shape[0] < 1 or shape[1] < 2:
        raise ValueError(f"{name} must have at least one layer and two experts; got the form {shape} in item 0")
    for item, rows in enumerate(column):
        if len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
            raise ValueError(
                f"{name} must have the same {shape[0]} layers and {shape[1]} experts in all items; got rows of "
                f"{[len(row) for row in rows]} in item {item}"
            )
        least = min(min(row) for row in rows)
        if not (least >= 0 and math.isfinite(math.fsum(math.fsum(row) for row in rows))):
            raise ValueError(f"{name} must be finite and at least 0; got {rows} in item {item}")
    return np.array(column, dtype=kind)


def _selections(name: str, column: list, num_experts: int) -> list[np.ndarray]:
    """The experts [L, T, K] of each item, checked."""
    if num_experts < 2:
        raise ValueError(f"num_experts must be given, and at least 2; got {num_experts}")
    windows: list[np.ndarray] = []
    for item, rows in enumerate(column):
        try:
            window = np.array(rows, dtype=np.int64)
        except (ValueError, TypeError):  # rows of different lengths
            window = np.zeros(0, dtype=np.int64)
        if window.ndim != 3 or window.size == 0:
            raise ValueError(f"{name} must be full rows [layers][tokens][experts]; got another form in item {item}")
        form = (window.shape[0], window.shape[2])
        if windows and form != (windows[0].shape[0], windows[0].shape[2]):
            raise ValueError(
                f"{name} must have the same layers and experts per token in all items; got {form} in item {item} and "
                f"{(windows[0].shape[0], windows[0].shape[2])} in item 0"
            )
        for expert in window[(window < 0) | (window >= num_experts)].tolist():
            raise ValueError(f"{name} must be from 0 to {num_experts - 1}; got {expert} in item {item}")
        ranked = np.sort(window, axis=-1)
        for layer, token, _ in np.argwhere(ranked[..., 1:] == ranked[..., :-1]):
            raise ValueError(
                f"{name} must differ within a token; got {window[layer, token].tolist()} in item {item}, layer "
                f"{layer}, token {token}"
            )
        windows.append(window)
    return windows
