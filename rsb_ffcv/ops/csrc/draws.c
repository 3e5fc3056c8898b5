/* What is drawn for the images of a batch: crop boxes, the layers of RandAugment and ColorJitter, boxes to erase.
 *
 * Every number is a pure function of its address. Nothing is fused or reordered (-ffp-contract=off, no -ffast-math): the same
 * address gives the same bits wherever IEEE arithmetic and libm's log, exp, sin, cos, tan and atan are the same.
 */
#include "draws.h"

#include <string.h>

RSB_INLINE double at_most(double value, double limit) { return limit < value ? limit : value; }
RSB_INLINE double at_least(double value, double limit) { return limit > value ? limit : value; }
RSB_INLINE int64_t rounded(double value) { return (int64_t)rint(value); } /* half to even, as Python's round */
RSB_INLINE double whole(double value) { return (double)(int64_t)value; } /* no negative zero comes out */

RSB_INLINE rsb_address address(uint64_t seed, uint64_t epoch, uint64_t slot, uint64_t op) {
    return (rsb_address){seed, (uint32_t)epoch, (uint32_t)slot, (uint32_t)op};
}

/* ---- single numbers ---- */

void rsb_philox(uint64_t seed, uint64_t epoch, uint64_t slot, uint64_t op, uint64_t block, uint32_t words[4]) {
    rsb_philox4(address(seed, epoch, slot, op), (uint32_t)block, words);
}

double rsb_uniform(uint64_t seed, uint64_t epoch, uint64_t slot, uint64_t op, uint64_t k) {
    return rsb_uniform_at(address(seed, epoch, slot, op), (uint32_t)k);
}

int64_t rsb_below(uint64_t seed, uint64_t epoch, uint64_t slot, uint64_t op, uint64_t k, uint64_t n) {
    return rsb_below_at(address(seed, epoch, slot, op), (uint32_t)k, n);
}

double rsb_normal(uint64_t seed, uint64_t epoch, uint64_t slot, uint64_t op, uint64_t k) {
    return rsb_normal_at(address(seed, epoch, slot, op), (uint32_t)k);
}

/* The log of a Gamma(shape, 1) variate, shape > 0; *k moves to the first unused draw. Marsaglia & Tsang 2000, boosted below 1.
 * The log, because a Gamma(0.1) variate underflows double often enough to make 0 / 0 in a beta. */
static double log_gamma(rsb_address at, uint32_t *k, double shape) {
    double d = (shape >= 1.0 ? shape : shape + 1.0) - 1.0 / 3.0, c = 1.0 / sqrt(9.0 * d), u, v, x;
    do {
        x = rsb_normal_at(at, *k);
        u = (rsb_word(at, *k + 2) + 1.0) * 0x1p-32;
        *k += 3;
        v = 1.0 + c * x;
        v = v * (v * v);
    } while (!(v > 0.0 && log(u) < 0.5 * x * x + d - d * v + d * log(v)));
    double result = log(d * v);
    if (shape < 1.0) result += log((rsb_word(at, (*k)++) + 1.0) * 0x1p-32) / shape;
    return result;
}

double rsb_beta(uint64_t seed, uint64_t epoch, uint64_t slot, uint64_t op, uint64_t first, double a) {
    rsb_address at = address(seed, epoch, slot, op);
    uint32_t k = (uint32_t)first;
    double x = log_gamma(at, &k, a), y = log_gamma(at, &k, a);
    return 1.0 / (1.0 + exp(at_most(y - x, 700.0)));
}

void rsb_words64(uint64_t seed, uint64_t epoch, uint64_t op, int64_t count, uint64_t *out) {
    for (int64_t slot = 0; slot < count; slot++) {
        uint32_t words[4];
        rsb_philox4(address(seed, epoch, (uint64_t)slot, op), 0, words);
        out[slot] = (uint64_t)words[0] << 32 | words[1];
    }
}

/* ---- boxes ---- */

/* torchvision's RandomResizedCrop.get_params: area uniform, aspect log-uniform; after 10 tries that do not fit, the largest
 * central crop whose aspect is in range. */
static void crop_box(rsb_address at, int64_t height, int64_t width, double scale_lo, double scale_hi, double ratio_lo,
                     double ratio_hi, double box[4]) {
    double area = (double)(height * width), log_lo = log(ratio_lo), log_hi = log(ratio_hi);
    for (uint32_t k = 0; k < 40; k += 4) { /* one Philox block a try */
        double target = area * (scale_lo + (scale_hi - scale_lo) * rsb_uniform_at(at, k));
        double aspect = exp(log_lo + (log_hi - log_lo) * rsb_uniform_at(at, k + 1));
        int64_t w = rounded(sqrt(target * aspect)), h = rounded(sqrt(target / aspect));
        if (0 < w && w <= width && 0 < h && h <= height) {
            box[0] = (double)rsb_below_at(at, k + 2, (uint64_t)(height - h + 1));
            box[1] = (double)rsb_below_at(at, k + 3, (uint64_t)(width - w + 1));
            box[2] = (double)h, box[3] = (double)w;
            return;
        }
    }
    int64_t h = height, w = width;
    if ((double)width / (double)height < ratio_lo) {
        h = rounded((double)width / ratio_lo);
        h = h < height ? h : height;
    } else if ((double)width / (double)height > ratio_hi) {
        w = rounded((double)height * ratio_hi);
        w = w < width ? w : width;
    }
    box[0] = (double)((height - h) / 2), box[1] = (double)((width - w) / 2), box[2] = (double)h, box[3] = (double)w;
}

void rsb_crop_boxes(uint64_t seed, uint64_t epoch, const int64_t *slots, const int64_t *heights, const int64_t *widths,
                    int64_t count, double scale_lo, double scale_hi, double ratio_lo, double ratio_hi, double flip_prob,
                    double *boxes, uint8_t *filters, uint8_t *flips) {
    for (int64_t i = 0; i < count; i++) {
        rsb_address at = address(seed, epoch, (uint64_t)slots[i], RSB_DRAW_CROP);
        crop_box(at, heights[i], widths[i], scale_lo, scale_hi, ratio_lo, ratio_hi, boxes + 4 * i);
        filters[i] = (uint8_t)rsb_below_at(at, 40, 2);
        at.op = RSB_DRAW_FLIP;
        flips[i] = rsb_uniform_at(at, 0) < flip_prob;
    }
}

void rsb_erase_boxes(uint64_t seed, uint64_t epoch, const int64_t *slots, int64_t count, int64_t height, int64_t width,
                     double prob, double min_area, double max_area, double min_aspect, double max_aspect, int64_t *boxes) {
    double log_lo = log(min_aspect), log_hi = log(max_aspect);
    memset(boxes, 0, (size_t)count * 4 * sizeof *boxes);
    for (int64_t i = 0; i < count; i++) {
        rsb_address at = address(seed, epoch, (uint64_t)slots[i], RSB_DRAW_ERASE);
        if (rsb_uniform_at(at, 0) >= prob) continue;
        for (uint32_t k = 4; k < 44; k += 4) {
            double area = (double)(height * width) * (min_area + (max_area - min_area) * rsb_uniform_at(at, k));
            double aspect = exp(log_lo + (log_hi - log_lo) * rsb_uniform_at(at, k + 1));
            int64_t h = rounded(sqrt(area * aspect)), w = rounded(sqrt(area / aspect));
            if (h < height && w < width) {
                int64_t top = rsb_below_at(at, k + 2, (uint64_t)(height - h + 1));
                int64_t left = rsb_below_at(at, k + 3, (uint64_t)(width - w + 1));
                boxes[4 * i] = top, boxes[4 * i + 1] = top + h, boxes[4 * i + 2] = left, boxes[4 * i + 3] = left + w;
                break;
            }
        }
    }
}

/* ---- layers ---- */

/* How a level and a sign become an op's argument, numbered as in ops/augment.py. */
enum { NONE, ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, BITS, BITS_INC, THRESHOLD, THRESHOLD_INC, ADD, ENHANCE,
       ENHANCE_INC, DESATURATE, SIGMA, SIGMA_RANDOM, PLAIN, SIGNED, DEGREES, SLANT_X, SLANT_Y, PIXELS_X, PIXELS_Y };

RSB_INLINE double radians(double degrees) { return degrees * (M_PI / 180.0); }

/* Pillow's Image.rotate about the centre. */
static void rotation(double argument[6], double degrees, double height, double width) {
    double turned = fmod(degrees, 360.0), angle = -radians(turned + (turned < 0.0 ? 360.0 : 0.0)); /* as Python's %, no -0.0 */
    double cosine = rint(cos(angle) * 1e15) / 1e15, sine = rint(sin(angle) * 1e15) / 1e15, x = width / 2, y = height / 2;
    double numbers[6] = {cosine, sine, cosine * -x + sine * -y + x, -sine, cosine, -sine * -x + cosine * -y + y};
    memcpy(argument, numbers, sizeof numbers);
}

/* Torchvision shears by the tangent of an angle that it rounds to degrees and back. */
static double slant(double shear) { return tan(radians(atan(shear) * (180.0 / M_PI))); }

void rsb_op_argument(double argument[6], int law, double level, double sign, double uniform, double height, double width) {
    double share = level / 10.0;
    memset(argument, 0, 6 * sizeof *argument);
    if ((law >= SHEAR_X && law <= TRANSLATE_Y) || (law >= SLANT_X && law <= PIXELS_Y)) argument[0] = argument[4] = 1.0;
    switch (law) {
    case ROTATE: rotation(argument, sign * (share * 30.0), height, width); break;
    case DEGREES: rotation(argument, sign * level, height, width); break;
    case SHEAR_X: argument[1] = sign * (share * 0.3); break;
    case SHEAR_Y: argument[3] = sign * (share * 0.3); break;
    case TRANSLATE_X: argument[2] = sign * (share * 0.45) * width; break;
    case TRANSLATE_Y: argument[5] = sign * (share * 0.45) * height; break;
    case SLANT_X: argument[1] = slant(sign * level); break;
    case SLANT_Y: argument[3] = slant(sign * level); break;
    case PIXELS_X: argument[2] = -whole(sign * level); break;
    case PIXELS_Y: argument[5] = -whole(sign * level); break;
    case BITS: argument[0] = whole(share * 4); break;
    case BITS_INC: argument[0] = 4 - whole(share * 4); break;
    case THRESHOLD: argument[0] = at_most(whole(share * 256), 256); break;
    case THRESHOLD_INC: argument[0] = 256 - at_most(whole(share * 256), 256); break;
    case ADD: argument[0] = at_most(whole(share * 110), 128); break;
    case ENHANCE: argument[0] = share * 1.8 + 0.1; break;
    case ENHANCE_INC: argument[0] = at_least(1.0 + sign * (share * 0.9), 0.1); break;
    case DESATURATE: argument[0] = at_most(at_least(1.0 - at_least(at_most(0.5 + 0.5 * share, 1.0), 0.5), 0.0), 1.0); break;
    case SIGMA: argument[0] = at_least(at_most(0.1 + (2.0 - 0.1) * share, 2.0), 0.1); break;
    case SIGMA_RANDOM: argument[0] = 0.1 + (2.0 * at_least(at_most(share, 1.0), 0.0) - 0.1) * uniform; break;
    case SIGNED: argument[0] = 1.0 + sign * level; break;
    case PLAIN: argument[0] = level; break;
    }
}

/* An index, with probability proportional to its weight; none that `chosen` has. */
static int choose(double uniform, const double *weights, uint8_t *chosen, int count) {
    double total = 0.0;
    int last = 0;
    for (int i = 0; i < count; i++) total += chosen[i] ? 0.0 : weights[i];
    for (int i = 0; i < count; i++) {
        if (chosen[i]) continue;
        last = i;
        uniform -= weights[i] / total;
        if (uniform < 0.0) break;
    }
    chosen[last] = 1;
    return last;
}

void rsb_draw_layers(uint64_t seed, uint64_t epoch, const int64_t *slots, const int64_t *heights, const int64_t *widths,
                     int64_t count, const rsb_policy *policy, rsb_layer *out) {
    for (int64_t i = 0; i < count; i++) {
        rsb_address at = address(seed, epoch, (uint64_t)slots[i], RSB_DRAW_RAND_AUGMENT);
        uint8_t chosen[RSB_MOST_CHOICES] = {0};
        for (int number = 0; number < policy->layers; number++) {
            uint32_t k = 8 * (uint32_t)number;
            rsb_layer *layer = out + i * policy->layers + number;
            int which = policy->weights ? choose(rsb_uniform_at(at, k), policy->weights, chosen, policy->choices)
                                        : (int)rsb_below_at(at, k, (uint64_t)policy->choices);
            memset(layer, 0, sizeof *layer);
            if (rsb_uniform_at(at, k + 1) >= policy->prob) continue;
            double level = policy->magnitude, deviation = policy->magnitude_std;
            if (policy->num_bins) {
                level = policy->bins[which * policy->num_bins + rsb_below_at(at, k + 2, (uint64_t)policy->num_bins)];
            } else {
                if (isinf(deviation)) level *= rsb_uniform_at(at, k + 2);
                else if (deviation > 0.0) level += deviation * rsb_normal_at(at, k + 2);
                level = at_least(at_most(level, policy->magnitude_max), 0.0);
            }
            double sign = rsb_uniform_at(at, k + 4) < 0.5 ? 1.0 : -1.0;
            layer->op = policy->ops[which];
            layer->filter = (uint8_t)rsb_below_at(at, k + 5, 2);
            rsb_op_argument(layer->argument, policy->laws[which], level, sign, rsb_uniform_at(at, k + 6), (double)heights[i],
                            (double)widths[i]);
        }
    }
}

void rsb_draw_jitter(uint64_t seed, uint64_t epoch, const int64_t *slots, int64_t count, const int32_t *ops, const double *low,
                     const double *high, int num_ops, rsb_layer *out) {
    memset(out, 0, (size_t)count * (size_t)num_ops * sizeof *out);
    for (int64_t i = 0; i < count; i++) {
        rsb_address at = address(seed, epoch, (uint64_t)slots[i], RSB_DRAW_JITTER);
        int places[RSB_MOST_CHOICES];
        for (int p = 0; p < num_ops; p++) places[p] = p;
        for (int p = 0; p < num_ops; p++) {
            int other = p + (int)rsb_below_at(at, (uint32_t)p, (uint64_t)(num_ops - p)), place = places[other];
            places[other] = places[p];
            places[p] = place;
        }
        for (int p = 0; p < num_ops; p++) {
            int place = places[p];
            rsb_layer *layer = out + i * num_ops + p;
            layer->op = ops[place];
            layer->argument[0] = low[place] + (high[place] - low[place]) * rsb_uniform_at(at, 4 + (uint32_t)place);
        }
    }
}
