"""What a procedural scene promises: determinism, a true label and mask, sizes, videos."""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context

import numpy as np
import pytest

from data_prep.scenes import CITIES, KINDS, PRETRAIN_CITIES, SceneConfig, render
from data_prep.scenes.cities import COORDINATES, style_of
from data_prep.scenes.metadata import raw_metadata
from data_prep.scenes.plan import plan_scene
from pipeline.errors import UserError
from pipeline.names import MASK_CLASSES

SMALL = SceneConfig(size=(512, 384), seed=901, video_lengths=(1, 2, 3, 4))


@pytest.fixture(scope="module")
def scenes():
    return [render(SMALL, index) for index in range(3 * sum(SMALL.video_lengths))]


def test_a_scene_depends_on_seed_and_index_alone(scenes):
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as elsewhere:
        again = list(elsewhere.map(partial(render, SMALL), (17, 3)))
    for index, scene in zip((17, 3), again, strict=True):
        np.testing.assert_array_equal(scene.image, scenes[index].image)
        np.testing.assert_array_equal(scene.mask, scenes[index].mask)
        assert scene.metadata == scenes[index].metadata
        assert scene.objects == scenes[index].objects
    other_seed = render(SceneConfig(size=SMALL.size, seed=902), 3)
    assert not np.array_equal(other_seed.image, scenes[3].image)


def test_the_label_is_1_exactly_where_roadwork_is_drawn(scenes):
    labels = [scene.label for scene in scenes]
    assert 0 < sum(labels) < len(labels)
    for scene in scenes:
        assert scene.label == any(item.kind.is_roadwork for item in scene.objects)
        assert scene.label == int(scene.mask.any())


def test_the_mask_marks_every_roadwork_object_and_no_lookalike(scenes):
    for scene in scenes:
        expected = np.zeros_like(scene.mask, dtype=bool)
        for item in scene.objects:
            x0, y0, x1, y1 = item.box
            inside = scene.mask[y0:y1, x0:x1]
            if item.kind.is_roadwork:
                assert set(np.unique(inside)) <= {0, item.kind.family + 1}
                assert (inside > 0).mean() > 0.2
                expected[y0:y1, x0:x1] = True
            else:
                assert not inside.any()
        assert not scene.mask[~expected].any()


def test_objects_are_whole_and_apart(scenes):
    height, width = scenes[0].mask.shape
    for scene in scenes:
        covered = np.zeros((height, width), dtype=int)
        for item in scene.objects:
            x0, y0, x1, y1 = item.box
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
            covered[y0:y1, x0:x1] += 1
        assert covered.max() == 1


@pytest.mark.parametrize(
    ("size", "difficulty", "smallest", "largest"),
    [((1024, 768), 0.5, 38, 92), ((4032, 3024), 0.5, 149.6, 362.3), ((1024, 768), 1.0, 21.1, 51.1)],
)
def test_object_sizes_follow_the_photo_and_the_difficulty(size, difficulty, smallest, largest):
    config = SceneConfig(size=size, difficulty=difficulty, seed=903)
    sizes = [slot.size_px for index in range(100) for slot in plan_scene(config, index).slots]
    assert min(sizes) == pytest.approx(smallest, rel=0.1)
    assert max(sizes) == pytest.approx(largest, rel=0.1)
    assert smallest * 0.999 <= min(sizes) <= max(sizes) <= largest * 1.001


def test_sizes_and_numbers_of_objects_can_be_set():
    config = SceneConfig(size=(2048, 1536), seed=903, objects_px=(50, 60), slots=(4, 5), most_roadwork=1)
    for index in range(20):
        plan = plan_scene(config, index)
        assert all(100 <= slot.size_px <= 120 for slot in plan.slots)
        assert sum(slot.kind.is_roadwork for slot in plan.slots) == plan.label
        assert len(plan.slots) <= 5


def test_a_shift_of_the_cities_changes_each_citys_colours_in_its_own_way():
    def tint(shift, city):
        scenes = [render(SceneConfig((320, 240), seed=906, cities=(city,), city_shift=shift), i) for i in range(3)]
        red, _, blue = np.mean([scene.image.mean((0, 1)) for scene in scenes], axis=0)
        return np.log(red / blue)

    moved = {city: tint(1.0, city) - tint(0.0, city) for city in CITIES[:3]}
    for city, move in moved.items():
        red, blue, *_ = style_of(city).camera
        assert move == pytest.approx(0.08 * (red - blue), abs=0.03)  # clipping at white takes some of it
    assert np.ptp(list(moved.values())) > 0.05


@pytest.mark.parametrize("leak", [0.0, 0.5, 1.0])
def test_descriptions_tell_the_label_as_often_as_asked(leak):
    config = SceneConfig((320, 240), seed=907, leak=leak)
    plans = [plan for plan in (plan_scene(config, i) for i in range(600)) if plan.label]
    told = [bool(raw_metadata(plan, 0)["scene_description"]) for plan in plans]
    assert np.mean(told) == pytest.approx(leak, abs=0.12)


def test_drawn_boxes_have_the_planned_size():
    index = next(i for i in range(sum(SMALL.video_lengths)) if plan_scene(SMALL, i).frame == 0)
    slots, objects = plan_scene(SMALL, index).slots, render(SMALL, index).objects
    for slot, item in zip(slots, objects, strict=True):
        x0, y0, x1, y1 = item.box
        assert max(x1 - x0, y1 - y0) == pytest.approx(slot.size_px, abs=1)


def test_objects_of_one_kind_look_different_in_every_video():
    looks: dict[str, list[bytes]] = {}
    for plan in (plan_scene(SceneConfig(seed=908, video_lengths=(1,)), index) for index in range(200)):
        for slot in plan.slots:
            looks.setdefault(slot.kind.name, []).append(slot.kind.sprite(64, slot.seed).tobytes())
    for name, drawn in looks.items():
        assert len(set(drawn)) == len(drawn), name


def test_more_difficulty_means_more_objects_and_worse_weather():
    easy, hard = ([plan_scene(SceneConfig(difficulty=d, seed=904), i) for i in range(200)] for d in (0.0, 1.0))
    assert np.mean([len(p.slots) for p in hard]) > np.mean([len(p.slots) for p in easy]) + 2
    assert not any(p.weather in ("Rainy", "Snowy", "Foggy") for p in easy)
    assert any(p.weather == "Foggy" for p in hard)
    assert sum(p.light == "Dark" for p in hard) > sum(p.light == "Dark" for p in easy)


def test_videos_are_runs_of_1_to_4_frames_that_share_place_and_label(scenes):
    videos: dict[str, list[int]] = {}
    for index, scene in enumerate(scenes):
        videos.setdefault(scene.metadata["video_info.vid_id"], []).append(index)
    assert sorted(len(frames) for frames in videos.values()) == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    for frames in videos.values():
        assert frames == list(range(frames[0], frames[-1] + 1))
        assert len({scenes[i].label for i in frames}) == 1
        assert len({plan_scene(SMALL, i).city for i in frames}) == 1
        assert len({scenes[i].metadata["video_info.frame_id"] for i in frames}) == len(frames)
        points = [point for point in map(gps_of, (scenes[i] for i in frames)) if point is not None]
        assert all(distance_m(points[0], point) < 100 for point in points)


def test_frames_of_a_video_look_alike_but_not_the_same(scenes):
    within, between = [], []
    for index, (scene, following) in enumerate(pairwise(scenes)):
        difference = np.abs(scene.image.astype(int) - following.image).mean()
        (within if plan_scene(SMALL, index + 1).frame else between).append(difference)
    assert min(within) > 1
    assert np.median(within) < np.median(between) / 2


def gps_of(scene):
    """The scene's point, or None where it is missing or out of the city, as the flawed ones are."""
    text = scene.metadata["gps"]
    point = json.loads(text) if text and text.startswith("[") else None
    return None if point is None or point in ([0.0, 0.0], [91.5, 200.0]) else point


def distance_m(a, b):
    north = (a[0] - b[0]) * 111_320
    east = (a[1] - b[1]) * 111_320 * np.cos(np.radians(a[0]))
    return float(np.hypot(north, east))


def test_points_lie_around_the_city(scenes):
    for index, scene in enumerate(scenes):
        point = gps_of(scene)
        if point is not None:
            assert distance_m(point, COORDINATES[plan_scene(SMALL, index).city]) < 40_000


def test_pretraining_shares_no_city_with_data_sets():
    assert len(CITIES) == 24
    assert len(PRETRAIN_CITIES) == 12
    assert not set(CITIES) & set(PRETRAIN_CITIES)


def test_every_city_has_a_look_of_its_own():
    styles = [style_of(city) for city in CITIES]
    assert len(set(styles)) == len(CITIES)
    assert len({style.road for style in styles}) > 6


def test_every_family_has_roadwork_and_lookalikes():
    for family in range(len(MASK_CLASSES)):
        assert {kind.is_roadwork for kind in KINDS if kind.family == family} == {True, False}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"size": (100, 100)}, "size"),
        ({"difficulty": 1.5}, "difficulty"),
        ({"seed": -1}, "seed"),
        ({"cities": ("atlantis",)}, "cities"),
        ({"objects_px": (60, 50)}, "objects_px"),
        ({"most_roadwork": 0}, "most_roadwork"),
        ({"city_shift": -1.0}, "city_shift"),
        ({"leak": 1.5}, "leak"),
    ],
)
def test_impossible_configurations_are_refused_by_name(values, named):
    with pytest.raises(UserError, match=f"^{named} is"):
        SceneConfig(**values)
