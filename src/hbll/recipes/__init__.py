"""Recipes: a data set, a network and the options to train it with, by name.

A new recipe is one file here with one subclass of `Recipe`, most often of `ChainRecipe`, and a line in the table.
"""

from collections.abc import Mapping

from hbll.recipes.base import Recipe, Schedule, flag
from hbll.recipes.char_rnn import CharRnn
from hbll.recipes.cifar10_conv import Cifar10Conv
from hbll.recipes.cifar10_resnet import Cifar10Resnet
from hbll.recipes.cifar10_vgg import Cifar10Vgg
from hbll.recipes.cifar_vit import Cifar10Vit, Cifar100Vit
from hbll.recipes.corpus_gpt import NovelsGpt, WikitextGpt
from hbll.recipes.digits import Digits
from hbll.recipes.measures import Measure
from hbll.recipes.mnist_mlp import MnistMlp
from hbll.recipes.mnist_normed_mlp import MnistNormedMlp
from hbll.recipes.sequential_mnist import SequentialMnist
from hbll.recipes.shakespeare_gpt import ShakespeareGpt

__all__ = ["RECIPES", "Measure", "Recipe", "Schedule", "flag"]

RECIPES: Mapping[str, type[Recipe]] = {
    recipe.name: recipe
    for recipe in (
        CharRnn,
        Cifar10Conv,
        Cifar10Resnet,
        Cifar10Vgg,
        Cifar10Vit,
        Cifar100Vit,
        Digits,
        MnistMlp,
        MnistNormedMlp,
        NovelsGpt,
        SequentialMnist,
        ShakespeareGpt,
        WikitextGpt,
    )
}
