"""The scores of single images, in the tables' order."""

from seppo_fast.evaluation.scores.aesthetic import AESTHETIC
from seppo_fast.evaluation.scores.base import Score
from seppo_fast.evaluation.scores.clipscore import CLIP_SCORE
from seppo_fast.evaluation.scores.hps import HPS_V2, HPS_V21
from seppo_fast.evaluation.scores.imagereward import IMAGEREWARD
from seppo_fast.evaluation.scores.pickscore import PICKSCORE

IMAGE_SCORES: tuple[Score, ...] = (PICKSCORE, HPS_V2, HPS_V21, IMAGEREWARD, AESTHETIC, CLIP_SCORE)
