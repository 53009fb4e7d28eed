import numpy as np
import open_clip
import pytest
import tiny
import torch
from training import little

from clipdistill.core.errors import ConfigError
from clipdistill.data.pictures import decode
from clipdistill.towers import context
from clipdistill.towers.blocks import blocks_of, find_block, tower_of
from clipdistill.towers.student import assemble
from clipdistill.towers.tap import Tap
from clipdistill.towers.teacher import load_teacher

TEXTS = [caption for pair in tiny.pairs(40) for caption in pair.captions]


@pytest.fixture(scope="module", params=["custom", "plain", "siglip"])
def teacher(request, tmp_path_factory):
    kind = {"siglip": request.param == "siglip", "custom": request.param != "plain"}
    return load_teacher(f"local-dir:{tiny.teacher_folder(tmp_path_factory.mktemp('t') / 'teacher', **kind)}")


def model(tower):
    vision = {"timm_model_name": tower, "timm_model_pretrained": False, "image_size": 64, "timm_pool": "avg"}
    vision |= {"timm_proj": "linear"}
    text = {"context_length": 16, "vocab_size": 40, "width": 16, "heads": 2, "layers": 3}
    return assemble({"embed_dim": 8, "custom_text": True, "vision_cfg": vision, "text_cfg": text}).eval()


@pytest.mark.parametrize(
    ("tower", "first", "last", "count"),
    [
        ("test_vit", "trunk.blocks.0", "trunk.blocks.5", 6),
        ("test_efficientnet", "trunk.blocks.0", "trunk.blocks.4", 5),
        ("test_resnet", "trunk.layer1", "trunk.layer4", 4),
        ("test_convnext", "trunk.stages.0", "trunk.stages.3", 4),
    ],
)
def test_the_blocks_of_timms_towers(tower, first, last, count):
    made = model(tower)
    blocks = blocks_of(made.visual, "image")
    assert (blocks[0], blocks[-1], len(blocks)) == (first, last, count)
    tap = Tap(made, "image", blocks, 2)
    with torch.no_grad():
        widths = tap.widths(lambda: made.visual(torch.zeros(1, 3, 64, 64)))
        with tap.watching():
            made.visual(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
            (one,) = tap.take()
    assert list(widths) == list(blocks)
    assert all(one.cells[name].shape == (2, 4, widths[name]) for name in blocks)


def test_open_clips_towers_and_their_texts_have_blocks(teacher):
    assert blocks_of(tower_of(teacher.model, "image"), "image") == ("transformer.resblocks.0",)
    text = tower_of(teacher.model, "text")
    assert blocks_of(text, "text") == ("transformer.resblocks.0", "transformer.resblocks.1")
    with pytest.raises(ConfigError, match=r"f: the text tower has no module 'visual\.conv1'"):
        find_block(text, "text", "visual.conv1", "f")


@pytest.mark.parametrize(
    ("share", "number"), [(0.0, 0), (0.1, 0), (1 / 6, 0), (0.2, 1), (0.5, 2), (0.51, 3), (5 / 6, 4), (1.0, 5)]
)
def test_a_share_of_the_depth_names_a_block(share, number):
    assert find_block(model("test_vit").visual, "image", share, "f") == f"trunk.blocks.{number}"


def test_a_name_that_does_not_exist_gets_the_nearest():
    visual = model("test_vit").visual
    assert find_block(visual, "image", "trunk.blocks.2.mlp", "f") == "trunk.blocks.2.mlp"
    with pytest.raises(ConfigError) as caught:
        find_block(visual, "image", "trunk.block.2", "features.image.0.student")
    assert "features.image.0.student: the image tower has no module 'trunk.block.2'" in str(caught.value)
    assert "did you mean 'trunk.blocks.2'?; its blocks are trunk.blocks.0 to trunk.blocks.5" in str(caught.value)
    with pytest.raises(ConfigError, match=r"between 0 and 1, got 1\.5"):
        find_block(visual, "image", 1.5, "f")
    with pytest.raises(ConfigError, match=r"the blocks of this image tower are not known; name the module"):
        find_block(torch.nn.Sequential(torch.nn.Linear(2, 2)), "image", 0.5, "f")


def test_picture_cells_are_the_tokens_without_the_class_token(teacher):
    images = [decode(pair.picture.data, 10**6, "") for pair in tiny.pairs(5)]
    pixels = torch.stack([teacher.transform(image) for image in images])
    visual = tower_of(teacher.model, "image")
    with Tap(teacher.model, "image", ["transformer.resblocks.0"], 2).watching() as tap:
        teacher.encode_decoded(images)
        (one,) = tap.take()
    with torch.no_grad():
        tokens = visual.forward_intermediates(pixels, output_fmt="NLC")["image_intermediates"][0]
    expected = tokens.reshape(5, 2, 2, -1).flatten(1, 2)  # a grid of 2 x 2 is its own cells
    torch.testing.assert_close(one.cells["transformer.resblocks.0"], expected, atol=1e-5, rtol=1e-5)


def test_text_cells_leave_out_the_padding_and_a_causal_towers_first_token(teacher):
    names = ["transformer.resblocks.0", "transformer.resblocks.1"]
    texts = ["a cat", "a very small round boat in a picture", ""]
    with Tap(teacher.model, "text", names, 1).watching() as tap:
        teacher.encode_texts(texts)
        (one,) = tap.take()
    text, tokens = tower_of(teacher.model, "text"), teacher.tokenizer(texts)
    causal = text.attn_mask is not None
    with torch.no_grad():
        x = text.token_embedding(tokens) + text.positional_embedding
        for name in names:
            x = text.get_submodule(name)(x, attn_mask=text.attn_mask)
            for row, ids in enumerate(tokens.tolist()):
                length = ids.index(max(ids)) + 1
                mean = x[row, 1 if causal else 0 : length].mean(dim=0)
                torch.testing.assert_close(one.cells[name][row, 0], mean, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [3, 63, 64, 80])
def test_grouped_texts_come_in_the_order_that_is_told(rows):
    """A batch of 64 texts or more is run in four groups of like length, each cut to its own longest text."""
    student = little.student()
    tokens = torch.from_numpy(student.tokenizer.encode(TEXTS[:rows]))[torch.randperm(rows)]
    with Tap(student.model, "text", ["transformer.resblocks.0"], 2).watching() as tap:
        student.embed_tokens(tokens)
        passes = tap.take()
    order = context.run_order(student.model, tokens)
    assert len(order) == len(passes) == (4 if rows >= 64 else 1)
    assert sorted(torch.cat(order).tolist()) == list(range(rows))
    if rows >= 64:
        assert len({one.given.shape[1] for one in passes}) > 1
        assert torch.cat(order).tolist() != list(range(rows))
    cells = torch.cat([one.cells["transformer.resblocks.0"] for one in passes])[torch.cat(order).argsort()]
    for row in range(rows):
        with Tap(student.model, "text", ["transformer.resblocks.0"], 2).watching() as tap:
            student.embed_tokens(tokens[row : row + 1])
            torch.testing.assert_close(tap.take()[0].cells["transformer.resblocks.0"][0], cells[row])


def test_only_passes_with_gradients_are_seen_where_asked():
    student = little.student("test_vit")
    with Tap(student.model, "image", ["trunk.blocks.1"], 1, trained=True).watching() as tap:
        student.encode_images([tiny.pairs(1)[0].picture])
        assert tap.take() == []
        student.embed_pixels(torch.zeros(2, 3, 32, 32))
        student.encode_images([tiny.pairs(1)[0].picture])
        (one,) = tap.take()
    assert one.cells["trunk.blocks.1"].shape[0] == 2
    assert one.cells["trunk.blocks.1"].requires_grad
    student.embed_pixels(torch.zeros(2, 3, 32, 32))
    assert tap.take() == []


def test_a_module_that_is_not_run_or_gives_no_cells_is_refused():
    student = little.student()
    tower = student.model.visual
    tower.unused = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="unused is not run by the tower"):
        Tap(student.model, "image", ["unused"], 1).widths(lambda: student.encode_images([tiny.pairs(1)[0].picture]))
    head = Tap(student.model, "image", ["head"], 2)
    with pytest.raises(ConfigError, match=r"head gives \[1, 16\], which are neither places nor tokens"):
        head.widths(lambda: student.encode_images([tiny.pairs(1)[0].picture]))


def test_lengths_of_texts_by_kind_of_tower():
    tokens = torch.tensor([[1, 5, 9, 0, 0], [1, 9, 0, 0, 0], [1, 2, 3, 4, 9]])

    class Text:
        pool_type = "argmax"

    assert context.lengths(Text(), tokens).tolist() == [3, 2, 5]
    Text.pool_type = "last"
    padded = torch.tensor([[5, 6, 1, 1, 1], [1, 1, 1, 1, 1], [5, 6, 7, 8, 1], [5, 6, 7, 8, 9]])
    assert context.lengths(Text(), padded).tolist() == [2, 1, 5, 5]


@pytest.mark.parametrize("pool", ["mean_pooler", "cls_pooler"])
def test_hugging_faces_text_towers_have_blocks_too(pool, tmp_path):
    from transformers import BertConfig

    BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16
    ).save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_tokenizer_name": str(tmp_path), "hf_pooler_type": pool}
    text |= {"hf_model_pretrained": False, "context_length": 12}
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    made = open_clip.model.CustomTextCLIP(8, vision, text).eval()
    blocks = blocks_of(made.text, "text")
    assert blocks == tuple(f"transformer.encoder.layer.{number}" for number in range(3))
    tokens = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    with torch.no_grad(), Tap(made, "text", blocks, 1).watching() as tap:
        made.encode_text(tokens)
        (one,) = tap.take()
        hidden = made.text.transformer(tokens, tokens != 0, output_hidden_states=True).hidden_states
    np.testing.assert_allclose(one.cells[blocks[1]][0, 0], hidden[2][0, :3].mean(dim=0), atol=1e-5)
    np.testing.assert_allclose(one.cells[blocks[1]][1, 0], hidden[2][1].mean(dim=0), atol=1e-5)
