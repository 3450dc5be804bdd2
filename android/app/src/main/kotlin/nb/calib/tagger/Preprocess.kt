package nb.calib.tagger

/**
 * From a decoded image to the network's input, equal to the Python chain: Pillow's antialiased bilinear resize of the
 * short side, centre crop, division by 255, normalization. Android's own scaling averages otherwise.
 */
class Preprocess(val size: Int, crop: Double) {
    private val short = Math.rint(size / crop).toInt()
    private val tables = Array(3) { c -> FloatArray(256) { (it.toFloat() / 255f - MEAN[c]) / STD[c] } }

    /** Float [3, size, size], red first. */
    fun tensor(image: Pixels): FloatArray {
        val side = minOf(image.width, image.height)
        val width = maxOf(1L, short.toLong() * image.width / side).toInt()
        val height = maxOf(1L, short.toLong() * image.height / side).toInt()
        val scaled = resize(image, width, height)
        val left = Math.rint((width - size) / 2.0).toInt()
        val top = Math.rint((height - size) / 2.0).toInt()
        val out = FloatArray(3 * size * size)
        for (y in 0 until size) for (x in 0 until size) {
            val pixel = scaled.argb[(top + y) * width + left + x]
            val at = y * size + x
            out[at] = tables[0][pixel shr 16 and 255]
            out[size * size + at] = tables[1][pixel shr 8 and 255]
            out[2 * size * size + at] = tables[2][pixel and 255]
        }
        return out
    }

    companion object {
        private val MEAN = floatArrayOf(0.485f, 0.456f, 0.406f) // ImageNet
        private val STD = floatArrayOf(0.229f, 0.224f, 0.225f)
        private const val BITS = 22 // of Pillow's fixed-point weights: 32 - 8 - 2

        /** Pillow's Image.resize with BILINEAR, bit by bit: a pass along rows, then one along columns. */
        fun resize(image: Pixels, width: Int, height: Int): Pixels {
            val rows = if (width == image.width) image else alongRows(image, width)
            return if (height == rows.height) rows else alongColumns(rows, height)
        }

        /** Weights of the pixels that each new pixel is made of. */
        private class Weights(source: Int, target: Int) {
            val first = IntArray(target)
            val weights: Array<IntArray>

            init {
                val scale = source.toDouble() / target
                val wide = maxOf(scale, 1.0)
                weights = Array(target) { k ->
                    val center = (k + 0.5) * scale
                    val low = maxOf((center - wide + 0.5).toInt(), 0)
                    val high = minOf((center + wide + 0.5).toInt(), source)
                    first[k] = low
                    val shares = DoubleArray(high - low) { maxOf(0.0, 1 - Math.abs((it + low - center + 0.5) / wide)) }
                    val sum = shares.sum()
                    IntArray(shares.size) { (shares[it] / sum * (1 shl BITS) + 0.5).toInt() }
                }
            }
        }

        private fun alongRows(image: Pixels, width: Int): Pixels {
            val plan = Weights(image.width, width)
            val out = IntArray(width * image.height)
            for (y in 0 until image.height) for (x in 0 until width) {
                out[y * width + x] = mix(image.argb, y * image.width + plan.first[x], 1, plan.weights[x])
            }
            return Pixels(width, image.height, out)
        }

        private fun alongColumns(image: Pixels, height: Int): Pixels {
            val plan = Weights(image.height, height)
            val out = IntArray(image.width * height)
            for (y in 0 until height) for (x in 0 until image.width) {
                out[y * image.width + x] = mix(image.argb, plan.first[y] * image.width + x, image.width, plan.weights[y])
            }
            return Pixels(image.width, height, out)
        }

        private fun mix(argb: IntArray, start: Int, step: Int, weights: IntArray): Int {
            var red = 1 shl BITS - 1
            var green = red
            var blue = red
            var at = start
            for (weight in weights) {
                val pixel = argb[at]
                red += (pixel shr 16 and 255) * weight
                green += (pixel shr 8 and 255) * weight
                blue += (pixel and 255) * weight
                at += step
            }
            return (255 shl 24) or (byte(red) shl 16) or (byte(green) shl 8) or byte(blue)
        }

        private fun byte(sum: Int) = (sum shr BITS).coerceIn(0, 255)
    }
}

/** EXIF's orientation: Android decodes a JPEG as it is stored, the Python chain turns it upright. */
object Exif {
    /** 1 to 8 from the bytes of a JPEG; 1 where nothing is said. */
    fun orientation(jpeg: ByteArray): Int {
        var at = 2
        if (jpeg.size < 4 || u8(jpeg, 0) != 0xff || u8(jpeg, 1) != 0xd8) return 1
        while (at + 4 <= jpeg.size && u8(jpeg, at) == 0xff) {
            val marker = u8(jpeg, at + 1)
            if (marker == 0xff) { at++; continue }
            if (marker == 0xda || marker == 0xd9) return 1
            val length = (u8(jpeg, at + 2) shl 8) or u8(jpeg, at + 3)
            val end = minOf(at + 2 + length, jpeg.size)
            if (marker == 0xe1 && end - at > 18 && String(jpeg, at + 4, 4, Charsets.ISO_8859_1) == "Exif") {
                return inTiff(jpeg, at + 10, end)
            }
            at += 2 + length
        }
        return 1
    }

    private fun inTiff(data: ByteArray, start: Int, end: Int): Int {
        val big = u8(data, start) == 'M'.code
        fun u16(at: Int) =
            if (at + 2 > end) 0 else if (big) (u8(data, at) shl 8) or u8(data, at + 1) else (u8(data, at + 1) shl 8) or u8(data, at)
        fun u32(at: Int) = if (big) (u16(at) shl 16) or u16(at + 2) else (u16(at + 2) shl 16) or u16(at)
        val directory = start + u32(start + 4)
        if (directory < start || directory + 2 > end) return 1
        for (k in 0 until u16(directory)) {
            val entry = directory + 2 + 12 * k
            if (entry + 12 > end) return 1
            if (u16(entry) == 0x0112) return u16(entry + 8).takeIf { it in 1..8 } ?: 1
        }
        return 1
    }

    private fun u8(data: ByteArray, at: Int) = data[at].toInt() and 255

    /** The image as it is meant to be seen. */
    fun upright(image: Pixels, orientation: Int): Pixels {
        if (orientation !in 2..8) return image
        val (w, h) = image.width to image.height
        val turned = orientation >= 5
        val (width, height) = if (turned) h to w else w to h
        val out = IntArray(w * h)
        for (y in 0 until height) for (x in 0 until width) {
            val (sx, sy) = when (orientation) {
                2 -> w - 1 - x to y
                3 -> w - 1 - x to h - 1 - y
                4 -> x to h - 1 - y
                5 -> y to x
                6 -> y to h - 1 - x
                7 -> w - 1 - y to h - 1 - x
                else -> w - 1 - y to x
            }
            out[y * width + x] = image.argb[sy * w + sx]
        }
        return Pixels(width, height, out)
    }
}
