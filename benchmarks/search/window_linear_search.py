"""Search for the `window-linear` recipe on stories260k with a quadratic prototype: one JSON line per variant.

Self-contained (torch, transformers, tokenizers), so that it runs on any machine; tunes on a held-out slice of the training file only.

    python benchmarks/search/window_linear_search.py --teacher stories260k --data train_a.txt --variants variants.json --out results.jsonl
"""

import argparse
import json
import math
import time

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

DEFAULTS = {
    "name": "base", "window": 16, "shape": "terraced", "map": "hedgehog", "features": 64, "init": "scales", "shift": "shared",
    "gain": False, "sinks": 0, "linear": True, "t1": 2_000_000, "lr1": 1e-2, "b1": 8, "loss1": "mse", "t2": 2_000_000, "lr2": 3e-3, "b2": 8,
    "rank": 8, "targets": "qkvo", "maps2": True, "lrm2": 1.0, "length": 512, "seed": 0, "ce": 0.0, "beta2": 0.999, "warm": 0.05, "dropwin": 0.0,
    "held": 160,
}  # fmt: skip
CURRENT: dict = {}


class FeatureMap(nn.Module):
    """Per-head map of q or k; returns features [B, H, T, F'] and a log scale [B, H, T, 1]."""

    def __init__(self, heads, dim, cfg, side):
        super().__init__()
        self.kind, self.gain = cfg["map"], cfg["gain"]
        features, root = cfg["features"], dim**-0.25
        g = torch.Generator().manual_seed(cfg["seed"] + (0 if cfg["init"] != "split" or side == "q" else 1))
        w = torch.empty(heads, dim, features)
        if cfg["init"] == "scales":
            copies = math.ceil(features / dim)
            scales = torch.logspace(-0.5, 0.7, copies) if copies > 1 else torch.ones(1)
            w[:] = torch.cat([torch.eye(dim) * s for s in scales], dim=1)[:, :features]
        elif cfg["init"] == "identity":
            w[:] = torch.eye(dim).repeat(1, math.ceil(features / dim))[:, :features]
        else:  # random directions, the same for q and k
            w[:] = torch.randn(heads, dim, features, generator=g)
            if cfg["init"] == "orth":
                for h in range(heads):
                    for j in range(0, features, dim):
                        block = torch.randn(dim, dim, generator=g)
                        qm, _ = torch.linalg.qr(block)
                        norm = torch.randn(dim, dim, generator=g).norm(dim=0)
                        w[h, :, j : j + dim] = (qm * norm)[:, : features - j]
            w *= root
        self.w = nn.Parameter(w)
        self.b = nn.Parameter(torch.zeros(heads, 1, features))
        self.u = nn.Parameter(torch.zeros(heads, dim, 1))
        self.c = nn.Parameter(torch.zeros(heads, 1, 1))
        self.root = root

    def forward(self, x):
        z = x @ self.w
        log_scale = x.new_zeros(())
        if self.kind == "hedgehog":
            phi = torch.cat([z.softmax(-1), (-z).softmax(-1)], -1).clamp(min=1e-12)
        elif self.kind == "softmax":  # one sign, bias
            phi = (z + self.b).softmax(-1)
        elif self.kind == "exp":
            z = z + self.b
            phi = torch.cat([z.clamp(-15, 15).exp(), (-z).clamp(-15, 15).exp()], -1) / math.sqrt(2 * z.shape[-1])
        elif self.kind == "prf":
            z = z + self.b - (x * self.root).square().sum(-1, keepdim=True) / 2
            phi = z.clamp(-20, 15).exp() / math.sqrt(z.shape[-1])
        elif self.kind == "t2r":
            phi = F.relu(z + self.b)
        elif self.kind == "softplus":
            phi = F.softplus(z + self.b) / math.sqrt(z.shape[-1])
        if self.gain:
            log_scale = (x @ self.u + self.c).clamp(-15, 15)
        return phi, log_scale


class Mix(nn.Module):
    def __init__(self, heads, dim, cfg):
        super().__init__()
        self.q, self.k = FeatureMap(heads, dim, cfg, "q"), FeatureMap(heads, dim, cfg, "k")
        self.log_g = nn.Parameter(torch.zeros(heads, 1, 1))


def masks(pos, cfg):
    """Window and far masks [B, 1, T, T] from document positions [B, T]."""
    t = pos.shape[1]
    i = torch.arange(t, device=pos.device)
    origin = i - pos
    ok = (origin[:, :, None] == origin[:, None, :]) & (i[:, None] >= i[None, :])
    w = cfg["window"]
    pq, pk = pos[:, :, None], pos[:, None, :]
    near = (pq - pk < w) if cfg["shape"] == "sliding" else (pq // w - pk // w < 2)
    near = near | (pk < cfg["sinks"])
    return (ok & near)[:, None], (ok & ~near)[:, None], ok[:, None]


def attend(module, q, k, v, mask, scaling=None, **kw):
    ctx = CURRENT
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    s = (q @ k.transpose(-1, -2)) * scaling
    near, far, causal = ctx["masks"]
    mode = ctx["mode"]
    if mode in ("teacher", "transfer"):
        y_t = s.masked_fill(~causal, -torch.inf).softmax(-1)
        out = y_t @ v
        if mode == "teacher":
            return out.transpose(1, 2), None
        with torch.enable_grad():
            q, k, v, s = q.detach(), k.detach(), v.detach(), s.detach()
            weights, den = mixed(module.mix, q, k, s, near, far, ctx["cfg"], ctx)
            y = (weights @ v) / den
            cfg = ctx["cfg"]
            loss = 0.0
            if "mse" in cfg["loss1"]:
                loss = loss + (y - out).square().mean() / out.square().mean()
            if "ce" in cfg["loss1"]:
                loss = loss - (y_t * (weights / den).clamp(min=1e-9).log()).masked_fill(~causal, 0).sum(-1).mean()
            if "far" in cfg["loss1"]:
                mass = y_t.masked_fill(~far, 0).sum(-1, keepdim=True)
                loss = loss + ((y - out).square() * mass).mean() / out.square().mean() * 4
        ctx["losses"].append(loss)
        return out.transpose(1, 2), None
    weights, den = mixed(module.mix, q, k, s, near, far, ctx["cfg"], ctx)
    return ((weights @ v) / den).transpose(1, 2), None


def mixed(mix, q, k, s, near, far, cfg, ctx):
    c = s.masked_fill(~near, -torch.inf).amax(-1, keepdim=True)
    if cfg["shift"] == "shared":
        c = c.clamp(min=0.0)
    p = (s - c).masked_fill(~near, -torch.inf).exp()
    if not cfg["linear"] or ctx.get("branch") == "window":
        return p, p.sum(-1, keepdim=True)
    fq, lq = mix.q(q)
    fk, lk = mix.k(k)
    if cfg["gain"]:
        fk = fk * lk.exp()
    a = fq @ fk.transpose(-1, -2)
    if cfg["shift"] == "shared":
        a = a * (lq - c).exp()
        weights = p + a.masked_fill(~far, 0.0)
    else:
        g = mix.log_g.sigmoid()
        weights = g * p + a.masked_fill(~far, 0.0)
    return weights, weights.sum(-1, keepdim=True)


class LoRA(nn.Module):
    def __init__(self, base, rank):
        super().__init__()
        self.base, self.on = base, True
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        y = self.base(x)
        return y + 2 * (x @ self.a.T) @ self.b.T if CURRENT["mode"] == "student" else y


def pack(path, tokenizer, length):
    stories = [x.strip() for x in open(path).read().split("\n\n") if x.strip()]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    docs = [[bos] + [t for t in tokenizer(x)["input_ids"] if t != bos] + [eos] for x in stories]
    return docs


def rows(docs, length):
    ids, pos, lab = [], [], []
    for d in docs:
        for j in range(0, len(d), length):
            piece = d[j : j + length]
            ids += piece
            pos += range(len(piece))
            lab += [-100] + piece[1:]
    n = len(ids) // length
    t = lambda x: torch.tensor(x[: n * length]).view(n, length)  # noqa: E731
    return t(ids), t(pos), t(lab)


def run(cfg, model_path, data_path, device):
    torch.manual_seed(cfg["seed"])
    tok = AutoTokenizer.from_pretrained(model_path)
    AttentionInterface.register("search", attend)
    m = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="search").to(device).float()
    m.requires_grad_(False)
    docs = pack(data_path, tok, cfg["length"])
    g = torch.Generator().manual_seed(1)
    order = torch.randperm(len(docs), generator=g).tolist()
    held = [docs[i] for i in order[: cfg["held"]]]
    train = rows([docs[i] for i in order[cfg["held"] :]], cfg["length"])
    held = [x.to(device) for x in rows(held, 512)]
    train = [x.to(device) for x in train]
    conf = m.config
    for layer in m.model.layers:
        layer.self_attn.mix = Mix(conf.num_attention_heads, conf.head_dim, cfg).to(device)
    CURRENT.update(cfg=cfg, mode="teacher", branch="both")

    def forward(batch, mode, branch="both"):
        CURRENT.update(mode=mode, losses=[], branch=branch, masks=masks(batch[1], cfg))
        return m(input_ids=batch[0], position_ids=batch[1], use_cache=False).logits

    @torch.no_grad()
    def evaluate(mode, branch="both"):
        total = count = 0.0
        for j in range(0, len(held[0]), 16):
            b = [x[j : j + 16] for x in held]
            logits = forward(b, mode, branch)[:, :-1]
            total += F.cross_entropy(logits.reshape(-1, logits.shape[-1]), b[2][:, 1:].reshape(-1), reduction="sum").item()
            count += (b[2][:, 1:] >= 0).sum().item()
        return total / count

    result = {"cfg": cfg, "teacher": evaluate("teacher"), "swap": evaluate("student"), "window": evaluate("student", "window")}
    start = time.time()

    def stage(params, tokens, batch, lr, loss_of):
        steps = int(tokens / (batch * cfg["length"]))
        if steps == 0:
            return
        opt = torch.optim.AdamW([{"params": p, "lr": lr * s} for p, s in params], betas=(0.9, cfg["beta2"]), weight_decay=0.0)
        base = [gr["lr"] for gr in opt.param_groups]
        gen = torch.Generator().manual_seed(cfg["seed"] + 7)
        perm = torch.empty(0, dtype=torch.long)
        every = [p for ps, _ in params for p in ps]
        for step in range(steps):
            if len(perm) < batch:
                perm = torch.cat([perm, torch.randperm(len(train[0]), generator=gen)])
            idx, perm = perm[:batch].to(device), perm[batch:]
            f = min(1.0, (step + 1) / max(1, cfg["warm"] * steps)) * (0.5 * (1 + math.cos(math.pi * step / steps)) * 0.99 + 0.01)
            for gr, b in zip(opt.param_groups, base, strict=True):
                gr["lr"] = b * f
            loss = loss_of([x[idx] for x in train])
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(every, 1.0)
            opt.step()

    maps = [p for layer in m.model.layers for p in layer.self_attn.mix.parameters()]

    def transfer(batch):
        with torch.no_grad():
            forward(batch, "transfer")
        return sum(CURRENT["losses"])

    if cfg["linear"] and cfg["t1"]:
        for p in maps:
            p.requires_grad_(True)
        stage([(maps, 1.0)], cfg["t1"], cfg["b1"], cfg["lr1"], transfer)
    result["stage1"] = evaluate("student")
    names = {"qkvo": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    names["all"] = [*names["qkvo"], "gate_proj", "up_proj", "down_proj"]
    lora = []
    for layer in m.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for n, child in list(parent.named_children()):
                if n in names[cfg["targets"]]:
                    new = LoRA(child, cfg["rank"]).to(device)
                    setattr(parent, n, new)
                    lora += [new.a, new.b]

    def distill(batch):
        with torch.no_grad():
            ref = forward(batch, "teacher").log_softmax(-1)
        drop = cfg["dropwin"] and torch.rand(()).item() < cfg["dropwin"]
        if drop:
            keep = CURRENT["cfg"]["window"]
            CURRENT["cfg"] = {**cfg, "window": 4}
            out = forward_with(batch, CURRENT["cfg"])
            CURRENT["cfg"] = {**cfg, "window": keep}
        else:
            out = forward(batch, "student")
        logp = out.log_softmax(-1)
        live = (batch[2][:, 1:] >= 0)[..., None]
        kl = (ref.exp() * (ref - logp))[:, :-1].masked_fill(~live, 0).sum() / live.sum()
        if cfg["ce"]:
            kl = kl + cfg["ce"] * F.cross_entropy(out[:, :-1].reshape(-1, out.shape[-1]), batch[2][:, 1:].reshape(-1))
        return kl

    def forward_with(batch, c):
        CURRENT.update(mode="student", losses=[], branch="both", masks=masks(batch[1], c))
        return m(input_ids=batch[0], position_ids=batch[1], use_cache=False).logits

    groups = [(lora, 1.0)]
    if cfg["maps2"] and cfg["linear"]:
        groups.append((maps, cfg["lrm2"]))
    stage(groups, cfg["t2"], cfg["b2"], cfg["lr2"], distill)
    result.update(stage2=evaluate("student"), stage2_window=evaluate("student", "window"), seconds=time.time() - start)
    for key in ("swap", "window", "stage1", "stage2", "stage2_window"):
        result["gap_" + key] = round(result[key] - result["teacher"], 4)
    return result


def main():
    parser = argparse.ArgumentParser()
    for name in ("teacher", "data", "variants", "out"):
        parser.add_argument("--" + name, required=True)
    parser.add_argument("--part", default="0/1")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    variants = json.load(open(args.variants))
    part, parts = map(int, args.part.split("/"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for variant in variants[part::parts]:
        unknown = set(variant) - set(DEFAULTS)
        assert not unknown, unknown
        try:
            result = run({**DEFAULTS, **variant}, args.teacher, args.data, device)
        except Exception as error:  # one broken variant must not end the search
            result = {"cfg": variant, "error": repr(error)[:300]}
        with open(args.out, "a") as f:
            f.write(json.dumps(result) + "\n")
        print(json.dumps({k: v for k, v in result.items() if k != "cfg"}), variant, flush=True)


if __name__ == "__main__":
    main()
